#pragma once

#include "comm/rails.h"

namespace dsv3rt {

const NodesTeam& team_of(const EpComm& comm);
const Rails* rails_of(const EpComm& comm);  // null within one node

}  // namespace dsv3rt
