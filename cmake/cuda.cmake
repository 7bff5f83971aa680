# The CUDA kernels, as the extension module _cuda beside _core. It is built where a CUDA compiler is found
# (AUTO), must be (ON), or is left out (OFF); without it everything else is the same. The CUDA runtime is
# linked in, so the module needs the driver alone, and loads without a GPU.

if(NOT RNNFAST_CUDA MATCHES "^(AUTO|ON|OFF)$")
  message(FATAL_ERROR "RNNFAST_CUDA is '${RNNFAST_CUDA}'; it must be AUTO, ON or OFF")
endif()
if(RNNFAST_CUDA STREQUAL "OFF")
  return()
endif()

# What is compiled decides how an architecture may be passed; ours are given for each target.
set(CMAKE_CUDA_ARCHITECTURES OFF)
include(CheckLanguage)
check_language(CUDA)
if(CMAKE_CUDA_COMPILER)
  enable_language(CUDA)
endif()
if(NOT CMAKE_CUDA_COMPILER OR CMAKE_CUDA_COMPILER_VERSION VERSION_LESS 12.4)
  set(reason "no CUDA compiler that works was found (12.4 or newer is needed; set CUDACXX to nvcc)")
  if(RNNFAST_CUDA STREQUAL "ON")
    message(FATAL_ERROR "RNNFAST_CUDA=ON, but ${reason}")
  endif()
  message(STATUS "rnnfast: no CUDA kernels, as ${reason}")
  return()
endif()

# Machine code for GPUs with tensor cores, and PTX: compute_75 for the one generation before them, and the
# newest for whatever comes.
if(CMAKE_CUDA_COMPILER_VERSION VERSION_LESS 12.8)
  set(default_architectures 75-virtual 80-real 90a-real 90-virtual)
else()
  set(default_architectures 75-virtual 80-real 90a-real 100)
endif()
set(RNNFAST_CUDA_ARCHITECTURES ${default_architectures} CACHE STRING
    "Architectures of the CUDA kernels, as CMake's CUDA_ARCHITECTURES")

find_package(CUDAToolkit REQUIRED)
pybind11_add_module(_cuda MODULE NO_EXTRAS csrc/cuda/bindings.cpp csrc/cuda/plan.cpp)
target_compile_features(_cuda PRIVATE cxx_std_17)
target_compile_options(_cuda PRIVATE -O2 -fvisibility=hidden -Wall -Wextra)
string(REPLACE ";" " " architectures "${RNNFAST_CUDA_ARCHITECTURES}")
target_compile_definitions(_cuda PRIVATE RNNFAST_ARCHITECTURES="${architectures}")
target_link_libraries(_cuda PRIVATE CUDA::cudart_static ${CMAKE_DL_LIBS})

# One object for each number format, so that they compile side by side.
function(rnnfast_add_kernels name source)
  add_library(cuda_${name} OBJECT ${source})
  set_target_properties(cuda_${name} PROPERTIES
    CUDA_STANDARD 17 CUDA_STANDARD_REQUIRED ON POSITION_INDEPENDENT_CODE ON
    CUDA_ARCHITECTURES "${RNNFAST_CUDA_ARCHITECTURES}")
  target_compile_options(cuda_${name} PRIVATE
    $<$<COMPILE_LANGUAGE:CUDA>:-O3 --expt-relaxed-constexpr --fmad=false -Xcompiler=-fvisibility=hidden>)
  target_compile_definitions(cuda_${name} PRIVATE ${ARGN})
  target_sources(_cuda PRIVATE $<TARGET_OBJECTS:cuda_${name}>)
endfunction()

rnnfast_add_kernels(device csrc/cuda/device.cu)
rnnfast_add_kernels(float32 csrc/cuda/kernels.cu RNNFAST_REAL=float)
rnnfast_add_kernels(float64 csrc/cuda/kernels.cu RNNFAST_REAL=double)
rnnfast_add_kernels(float16 csrc/cuda/kernels.cu RNNFAST_REAL=Float16)
rnnfast_add_kernels(bfloat16 csrc/cuda/kernels.cu RNNFAST_REAL=BFloat16)

install(TARGETS _cuda LIBRARY DESTINATION rnnfast)
