// The Python surface of the kernels: one `bind_<room>` per op family.
#include <pybind11/pybind11.h>

#include "comm/bind.h"
#include "common/build_info.h"
#include "embed/bind.h"
#include "gemm/bind.h"
#include "loss/bind.h"
#include "mla/bind.h"
#include "moe/bind.h"
#include "optim/bind.h"
#include "quant/bind.h"

namespace py = pybind11;

PYBIND11_MODULE(_C, module) {
  module.doc() = "dsv3rt's CUDA kernels over DLPack arrays; use dsv3rt.ops, which checks, allocates and documents.";
  module.def("build_info", [] {
    const dsv3rt::BuildInfo info = dsv3rt::build_info();
    py::dict result;
    result["version"] = DSV3RT_VERSION;
    result["cuda"] = true;
    result["cuda_version"] =
        std::to_string(info.cuda_version / 1000) + "." + std::to_string(info.cuda_version % 1000 / 10);
    result["arch"] = info.arch;
    result["kernels"] = py::make_tuple(
        "quantize_1x128", "quantize_128x128", "swiglu_quantize_1x128", "swiglu_backward_quantize_1x128", "fp8_gemm_nt",
        "m_grouped_fp8_gemm_nt", "k_grouped_fp8_gemm_nt", "mla_prefill", "mla_prefill_backward", "rms_norm",
        "rms_norm_backward", "rms_norm_quantize_1x128", "rope", "embedding_backward", "softmax_loss", "adamw_step",
        "grad_norms", "route", "balance_loss", "permute", "unpermute", "mla_decode", "append_latents");
    return result;
  });
  dsv3rt::bind_comm(module);
  dsv3rt::bind_embed(module);
  dsv3rt::bind_gemm(module);
  dsv3rt::bind_loss(module);
  dsv3rt::bind_mla(module);
  dsv3rt::bind_moe(module);
  dsv3rt::bind_optim(module);
  dsv3rt::bind_quant(module);
}
