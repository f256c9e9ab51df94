// What the launches of both passes share.
#pragma once

#include "common/launch.h"
#include "common/tma_desc.h"
#include "mla/params.h"

namespace dsv3rt {

constexpr int kMaxSharedBytes = 232448;

// The map of an array of `rows` rows, `box_rows` of which, of one head, are loaded at a time.
inline const char* encode_heads(CUtensorMap& map, const HeadsView& view, int rows, int heads, int columns,
                                int box_rows) {
  return encode_map(map, SlabMapSpec{view.data, rows, heads, columns, view.row_stride, view.head_stride, box_rows});
}

}  // namespace dsv3rt
