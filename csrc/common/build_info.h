#pragma once

namespace dsv3rt {

struct BuildInfo {
  int cuda_version;  // of the toolkit, 1000 * major + 10 * minor
  const char* arch;
};

BuildInfo build_info();

}  // namespace dsv3rt
