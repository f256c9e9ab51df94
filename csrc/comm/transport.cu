// The host's side: NCCL, found in the process at run time, makes the communicator and the window.
//
// Kernels get the windows of their node's ranks as plain addresses. Only those that put between nodes (rails.cu) depend
// on how NCCL lays out its device structures, so only a group of several nodes asks for exactly the version of the
// build.
#include "comm/transport.h"

#include <cuda_runtime.h>
#include <dlfcn.h>

#include <cstring>
#include <memory>
#include <string>
#include <vector>

#include "common/launch.h"

#include "comm/rails_nccl.h"

#if __has_include(<nccl_device/host.h>)
#include <nccl.h>
#include <nccl_device/host.h>
#elif __has_include(<nccl_device/core.h>)  // before 2.32
#include <nccl.h>
#include <nccl_device/core.h>
#endif
#if defined(NCCL_VERSION_CODE) && NCCL_VERSION_CODE >= 23000
#define DSV3RT_NCCL_VERSION NCCL_VERSION_CODE
#else
#define DSV3RT_NCCL_VERSION 0
#endif

namespace dsv3rt {
#if DSV3RT_NCCL_VERSION

namespace {

const char* keep(std::string text) {
  thread_local std::string kept;
  kept = std::move(text);
  return kept.c_str();
}

constexpr int kLeastVersion = 23000;  // windows with peers' addresses for the host

std::string version_text(int version) {
  return std::to_string(version / 10000) + "." + std::to_string(version / 100 % 100) + "." +
         std::to_string(version % 100);
}

// The functions of the NCCL that is in the process.
struct Nccl {
  decltype(&ncclGetVersion) get_version;
  decltype(&ncclGetErrorString) error_string;
  decltype(&ncclGetLastError) last_error;
  decltype(&ncclGetUniqueId) unique_id;
  decltype(&ncclCommInitRank) init_rank;
  decltype(&ncclCommDestroy) destroy;
  decltype(&ncclCommAbort) abort;
  decltype(&ncclMemAlloc) mem_alloc;
  decltype(&ncclMemFree) mem_free;
  decltype(&ncclCommWindowRegister) window_register;
  decltype(&ncclCommWindowDeregister) window_deregister;
  decltype(&ncclGetLsaDevicePointer) lsa_pointer;
  ncclTeam_t (*lsa_team)(ncclComm_t);
#if DSV3RT_HAS_RAILS
  decltype(&ncclCommQueryProperties) query_properties;
  decltype(&ncclDevCommCreate) dev_comm_create;
  decltype(&ncclDevCommDestroy) dev_comm_destroy;
#endif
  std::string missing;
  int version = 0;

  Nccl() {
    void* library = dlopen("libnccl.so.2", RTLD_NOW | RTLD_NOLOAD);  // torch's, or one preloaded over it
    if (library == nullptr) library = dlopen("libnccl.so.2", RTLD_NOW);
    if (library == nullptr) {
      missing = "no libnccl.so.2 was found: pip install nvidia-nccl-cu13 (or -cu12)";
      return;
    }
    if (!find(library, "ncclGetVersion", get_version) || get_version(&version) != ncclSuccess) return;
    if (version < kLeastVersion) {
      missing = "NCCL " + version_text(version) + " is loaded, " + version_text(kLeastVersion) +
                " or newer is needed: install a newer nvidia-nccl-cu13 (or -cu12), or preload its libnccl.so.2";
      return;
    }
    find(library, "ncclGetErrorString", error_string) && find(library, "ncclGetLastError", last_error) &&
        find(library, "ncclGetUniqueId", unique_id) && find(library, "ncclCommInitRank", init_rank) &&
        find(library, "ncclCommDestroy", destroy) && find(library, "ncclCommAbort", abort) &&
        find(library, "ncclMemAlloc", mem_alloc) && find(library, "ncclMemFree", mem_free) &&
        find(library, "ncclCommWindowRegister", window_register) &&
        find(library, "ncclCommWindowDeregister", window_deregister) &&
        find(library, "ncclGetLsaDevicePointer", lsa_pointer) && find(library, "ncclTeamLsa", lsa_team);
#if DSV3RT_HAS_RAILS
    if (version == DSV3RT_NCCL_VERSION) {
      find(library, "ncclCommQueryProperties", query_properties) &&
          find(library, "ncclDevCommCreate", dev_comm_create) && find(library, "ncclDevCommDestroy", dev_comm_destroy);
    }
#endif
  }

  template <typename Function>
  bool find(void* library, const char* name, Function& function) {
    function = reinterpret_cast<Function>(dlsym(library, name));
    if (function == nullptr) missing = std::string("the loaded NCCL has no ") + name;
    return function != nullptr;
  }
};

const Nccl& nccl() {
  static const Nccl found;
  return found;
}

const char* check(ncclResult_t result, const char* step, ncclComm_t comm = nullptr) {
  if (result == ncclSuccess) return nullptr;
  return keep(std::string(step) + ": " + nccl().error_string(result) + " (" + nccl().last_error(comm) + ")");
}

}  // namespace

#define DSV3RT_NCCL_CHECK(call, step)                       \
  do {                                                      \
    const char* what_ = check((call), (step), comm->comm_); \
    if (what_ != nullptr) return what_;                     \
  } while (0)

class EpComm {
 public:
  NodesTeam team{};
  int device = 0;

  static const char* create(const EpShape& shape, const uint8_t id[kUniqueIdBytes], int device, int64_t timeout_us,
                            EpComm* comm) {
    const DeviceGuard guard(device);
    DSV3RT_CUDA_CHECK(guard.status());
    comm->device = device;
    comm->team.shape = shape;
    comm->team.timeout_ns = timeout_us * 1000;
    ncclUniqueId unique;
    static_assert(sizeof(unique) == kUniqueIdBytes);
    std::memcpy(&unique, id, sizeof(unique));
    DSV3RT_NCCL_CHECK(nccl().init_rank(&comm->comm_, shape.num_ranks, unique, shape.rank), "ncclCommInitRank");
    const ncclTeam_t node = nccl().lsa_team(comm->comm_);
    comm->team.nodes = nodes_of(shape, node.nRanks);
    if (comm->team.nodes.count > 1) comm->team.shape.max_rows = 0;  // rows between nodes are pushed
    comm->team.at = layout_of(comm->team.shape);
    comm->team.rails.bytes = comm->team.at.bytes;
    if (comm->team.nodes.count > 1) {
      comm->team.rails = rail_layout_of(shape, comm->team.at, comm->team.nodes.count);
      if (const char* error = check_nodes(shape, node)) return error;
      if (const char* error = comm->make_rails()) return error;
    }
    if (const char* error = comm->make_window()) return error;
#if DSV3RT_HAS_RAILS
    if (comm->rails_) comm->rails_->window = comm->window_;
#endif
    return nullptr;
  }

  const Rails* rails() const { return rails_.get(); }

  ~EpComm() {
    const DeviceGuard guard(device);
    if (comm_ != nullptr && team.error != nullptr && team.error->is_complete) {
      nccl().abort(comm_);  // peers may be gone: their windows are left to the end of the process
    } else if (comm_ != nullptr) {
      cudaDeviceSynchronize();
      drop_rails();
      if (window_ != nullptr) nccl().window_deregister(comm_, window_);
      if (base_ != nullptr) nccl().mem_free(base_);
      nccl().destroy(comm_);
    }
    if (table_ != nullptr) cudaFree(table_);
    if (team.error != nullptr) cudaFreeHost(team.error);
  }

 private:
  static const char* check_nodes(const EpShape& shape, const ncclTeam_t& node) {
    const std::string found = ", got " + std::to_string(shape.num_ranks) + " ranks in teams of " +
                              std::to_string(node.nRanks) + " that reach each other's memory";
    if (shape.low_latency) return keep("the low-latency form needs a group within one team" + found);
    if (shape.num_ranks % node.nRanks != 0 || node.stride != 1 || shape.rank % node.nRanks != node.rank) {
      return keep("nodes must have equally many ranks, with consecutive numbers" + found);
    }
    if (DSV3RT_HAS_RAILS && nccl().version == DSV3RT_NCCL_VERSION) return nullptr;
    return keep("between nodes kernels must be built for the NCCL in the process, 2.32 or newer: built for " +
                version_text(DSV3RT_NCCL_VERSION) + ", loaded is " + version_text(nccl().version) + found);
  }

#if DSV3RT_HAS_RAILS
  const char* make_rails() {
    EpComm* comm = this;
    ncclCommProperties_t properties = NCCL_COMM_PROPERTIES_INITIALIZER;
    DSV3RT_NCCL_CHECK(nccl().query_properties(comm_, &properties), "ncclCommQueryProperties");
    ncclGinType_t type = properties.railedGinType;
    bool known = false;
    for (const ncclGinType_t ours : kRailTypes) known = known || type == ours;
    if (!known && properties.ginSupport[NCCL_GIN_TYPE_PROXY]) type = NCCL_GIN_TYPE_PROXY, known = true;
    if (!known) {
      return keep("NCCL finds no way to put between nodes that these kernels know (ginType " + std::to_string(type) +
                  "): it needs InfiniBand or RoCE with GPUDirect RDMA, see NCCL_DEBUG=INFO");
    }
    ncclDevCommRequirements_t needs = NCCL_DEV_COMM_REQUIREMENTS_INITIALIZER;
    needs.ginConnectionType = NCCL_GIN_CONNECTION_RAIL;
    needs.ginContextCount = kRailContexts;
    needs.ginSignalCount = kRailPhases * team.nodes.count;
    needs.ginVaSignalsRequired = false;
    if (type != properties.railedGinType) needs.ginType = type;
    auto made = std::make_unique<Rails>();
    DSV3RT_NCCL_CHECK(nccl().dev_comm_create(comm_, &needs, &made->device), "ncclDevCommCreate");
    rails_ = std::move(made);
    return nullptr;
  }

  // Waits for signals that are under way: they may not find their target gone.
  void drop_rails() {
    if (!rails_) return;
    if (rails_->window != nullptr) {
      settle_rails(*rails_, team, nullptr);
      cudaDeviceSynchronize();
    }
    nccl().dev_comm_destroy(comm_, &rails_->device);
  }
#else
  const char* make_rails() { return nullptr; }
  void drop_rails() {}
#endif

  const char* make_window() {
    EpComm* comm = this;
    DSV3RT_NCCL_CHECK(nccl().mem_alloc(&base_, team.rails.bytes), "ncclMemAlloc");
    DSV3RT_CUDA_CHECK(cudaMemset(base_, 0, team.rails.bytes));
    DSV3RT_NCCL_CHECK(nccl().window_register(comm_, base_, team.rails.bytes, &window_, NCCL_WIN_COLL_SYMMETRIC),
                      "ncclCommWindowRegister");
    std::vector<void*> peers(team.nodes.size);
    for (int rank = 0; rank < team.nodes.size; ++rank) {
      DSV3RT_NCCL_CHECK(nccl().lsa_pointer(window_, 0, rank, &peers[rank]), "ncclGetLsaDevicePointer");
      if (peers[rank] == nullptr) return keep("ncclGetLsaDevicePointer: no address of rank " + std::to_string(rank));
    }
    DSV3RT_CUDA_CHECK(cudaMalloc(&table_, peers.size() * sizeof(void*)));
    DSV3RT_CUDA_CHECK(cudaMemcpy(table_, peers.data(), peers.size() * sizeof(void*), cudaMemcpyHostToDevice));
    void* error = nullptr;
    DSV3RT_CUDA_CHECK(cudaHostAlloc(&error, sizeof(EpError), cudaHostAllocMapped));
    std::memset(error, 0, sizeof(EpError));
    team.error = static_cast<EpError*>(error);
    team.self = static_cast<char*>(peers[team.nodes.rail]);
    team.peers = static_cast<char**>(table_);
    DSV3RT_CUDA_CHECK(cudaDeviceSynchronize());
    return nullptr;
  }

  ncclComm_t comm_ = nullptr;
  ncclWindow_t window_ = nullptr;
  void* base_ = nullptr;
  void* table_ = nullptr;
  std::unique_ptr<Rails> rails_;
};

const char* ep_nccl_version(int* compiled, int* loaded) {
  *compiled = DSV3RT_NCCL_VERSION;
  *loaded = nccl().version;
  return nccl().missing.empty() ? nullptr : nccl().missing.c_str();
}

const char* ep_unique_id(uint8_t id[kUniqueIdBytes]) {
  if (!nccl().missing.empty()) return nccl().missing.c_str();
  ncclUniqueId unique;
  if (const char* error = check(nccl().unique_id(&unique), "ncclGetUniqueId")) return error;
  std::memcpy(id, &unique, sizeof(unique));
  return nullptr;
}

const char* ep_create(const EpShape& shape, const uint8_t id[kUniqueIdBytes], int device, int64_t timeout_us,
                      EpComm** comm) {
  if (!nccl().missing.empty()) return nccl().missing.c_str();
  auto made = std::make_unique<EpComm>();
  if (const char* error = EpComm::create(shape, id, device, timeout_us, made.get())) return error;
  *comm = made.release();
  return nullptr;
}

#else  // built without NCCL's headers: nothing can be created

class EpComm {
 public:
  NodesTeam team{};
  int device = 0;
  const Rails* rails() const { return nullptr; }
};

namespace {
constexpr char kLeftOut[] =
    "the kernels were built without NCCL's headers: pip install nvidia-nccl-cu13 (or -cu12), then build again";
}  // namespace

const char* ep_nccl_version(int* compiled, int* loaded) {
  *compiled = *loaded = 0;
  return kLeftOut;
}

const char* ep_unique_id(uint8_t[kUniqueIdBytes]) { return kLeftOut; }

const char* ep_create(const EpShape&, const uint8_t[kUniqueIdBytes], int, int64_t, EpComm**) { return kLeftOut; }

#endif

const NodesTeam& team_of(const EpComm& comm) { return comm.team; }
const Rails* rails_of(const EpComm& comm) { return comm.rails(); }

const char* ep_destroy(EpComm* comm) {
  delete comm;
  return nullptr;
}

const EpShape& ep_shape(const EpComm* comm) { return comm->team.shape; }
int ep_device(const EpComm* comm) { return comm->device; }
int64_t ep_window_bytes(const EpComm* comm) { return comm->team.rails.bytes; }
void* ep_room(const EpComm* comm, EpRoom room) {
  return comm->team.shape.max_rows == 0 ? nullptr : comm->team.self + room_offset(comm->team.at, room);
}
int ep_num_nodes(const EpComm* comm) { return comm->team.nodes.count; }
int64_t ep_rail_words(const EpComm* comm) {
  const int nodes = comm->team.nodes.count;
  return nodes > 1 ? int64_t(2) * nodes * rail_words(comm->team.shape) : 0;
}

EpError ep_error(const EpComm* comm) { return *comm->team.error; }

}  // namespace dsv3rt
