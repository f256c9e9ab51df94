# The kernel library: every .cu of csrc, ahead of time for sm_90a, with its own static CUDA runtime.
set(CMAKE_CUDA_COMPILER ${DSV3RT_NVCC})
set(CMAKE_CUDA_STANDARD 20)
set(CMAKE_CUDA_STANDARD_REQUIRED ON)
set(CMAKE_CUDA_ARCHITECTURES 90a-real)
set(CMAKE_CUDA_RUNTIME_LIBRARY Static)
enable_language(CUDA)
if(CMAKE_CUDA_COMPILER_VERSION VERSION_LESS 12.9)
  message(FATAL_ERROR "dsv3rt needs CUDA 12.9 or newer, got ${CMAKE_CUDA_COMPILER_VERSION} at ${DSV3RT_NVCC}")
endif()

file(GLOB_RECURSE DSV3RT_KERNEL_SOURCES CONFIGURE_DEPENDS ${CMAKE_SOURCE_DIR}/csrc/*.cu ${CMAKE_SOURCE_DIR}/csrc/heuristics.cpp
     ${CMAKE_SOURCE_DIR}/csrc/*heuristics.cpp)

function(dsv3rt_compile_kernels target)
  target_include_directories(${target} PRIVATE ${CMAKE_SOURCE_DIR}/csrc)
  if(DSV3RT_FOR_RACECHECK)  # whose arrivals take registers
    target_compile_definitions(${target} PRIVATE DSV3RT_FOR_RACECHECK)
  else()
    set(DSV3RT_NO_SPILLS -Xptxas=--warn-on-spills -Xptxas=--warn-on-local-memory-usage)
  endif()
  target_compile_options(${target} PRIVATE
    $<$<COMPILE_LANGUAGE:CUDA>:--ptxas-options=--register-usage-level=10 ${DSV3RT_NO_SPILLS} -Xptxas=-Werror -Werror=all-warnings -lineinfo>)
endfunction()

# Forward GEMMs: ptxas's control bits of their promotion are set anew in the objects (promotion_bits.py).
set(DSV3RT_FORWARD_GEMM ${CMAKE_SOURCE_DIR}/csrc/gemm/instances/dense_bf16.cu
    ${CMAKE_SOURCE_DIR}/csrc/gemm/instances/grouped_rows_bf16.cu)
set(DSV3RT_PROMOTION_BITS ${CMAKE_SOURCE_DIR}/cmake/promotion_bits.py)
list(REMOVE_ITEM DSV3RT_KERNEL_SOURCES ${DSV3RT_FORWARD_GEMM})
add_library(dsv3rt_forward_gemm OBJECT ${DSV3RT_FORWARD_GEMM})
dsv3rt_compile_kernels(dsv3rt_forward_gemm)
target_compile_options(dsv3rt_forward_gemm PRIVATE --no-compress)
set_source_files_properties(${DSV3RT_FORWARD_GEMM} PROPERTIES OBJECT_DEPENDS ${DSV3RT_PROMOTION_BITS})
set(DSV3RT_LAUNCHER ${Python_EXECUTABLE} ${DSV3RT_PROMOTION_BITS} ${CMAKE_CUDA_COMPILER_LAUNCHER})
set_target_properties(dsv3rt_forward_gemm PROPERTIES CUDA_COMPILER_LAUNCHER "${DSV3RT_LAUNCHER}")

add_library(dsv3rt_kernels SHARED ${DSV3RT_KERNEL_SOURCES} $<TARGET_OBJECTS:dsv3rt_forward_gemm>)
dsv3rt_compile_kernels(dsv3rt_kernels)

# The comm room needs the headers of NCCL 2.30 or newer; the library itself is found when it is used.
find_path(DSV3RT_NCCL_INCLUDE nccl_device.h
          HINTS ENV NCCL_HOME ${DSV3RT_SITE}/nvidia/nccl PATHS /usr/local/cuda PATH_SUFFIXES include)
if(DSV3RT_NCCL_INCLUDE)
  target_include_directories(dsv3rt_kernels SYSTEM PRIVATE ${DSV3RT_NCCL_INCLUDE})
  message(STATUS "dsv3rt: expert parallelism with NCCL's headers from ${DSV3RT_NCCL_INCLUDE}")
else()
  message(STATUS "dsv3rt: no kernels of expert parallelism (no NCCL headers: pip install nvidia-nccl-cu13)")
endif()
message(STATUS "dsv3rt: kernels with ${CMAKE_CUDA_COMPILER} ${CMAKE_CUDA_COMPILER_VERSION} for sm_90a")
