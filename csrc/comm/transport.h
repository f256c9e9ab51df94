#pragma once

#include "comm/window.h"

namespace dsv3rt {

const Team& team_of(const EpComm& comm);

}  // namespace dsv3rt
