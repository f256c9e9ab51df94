# Looks for what the build needs. Sets DSV3RT_CAN_BUILD, or DSV3RT_MISSING with the reason.
include(CheckLanguage)
set(DSV3RT_CAN_BUILD OFF)

check_language(CXX)
if(NOT CMAKE_CXX_COMPILER)
  set(DSV3RT_MISSING "no C++ compiler was found")
  return()
endif()

if(NOT DSV3RT_PREBUILT)
  # A system toolkit, or the pip packages nvidia-cuda-nvcc, -crt, -cccl and -runtime.
  execute_process(COMMAND ${Python_EXECUTABLE} -c "import sysconfig; print(sysconfig.get_path('purelib'))"
                  OUTPUT_VARIABLE DSV3RT_SITE OUTPUT_STRIP_TRAILING_WHITESPACE)
  find_program(DSV3RT_NVCC nvcc
               HINTS ENV CUDACXX ENV CUDA_HOME ENV CUDA_PATH
               PATHS /usr/local/cuda ${DSV3RT_SITE}/nvidia/cu13 ${DSV3RT_SITE}/nvidia/cuda_nvcc
               PATH_SUFFIXES bin)
  if(NOT DSV3RT_NVCC)
    set(DSV3RT_MISSING "no nvcc was found: install the CUDA toolkit 12.9 or 13, or pip install nvidia-cuda-nvcc nvidia-cuda-crt nvidia-cuda-cccl nvidia-cuda-runtime")
    return()
  endif()
endif()
set(DSV3RT_CAN_BUILD ON)
