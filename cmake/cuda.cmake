# Decides whether CUDA kernels are built. There are none yet, so a compiler that is found changes nothing;
# asking for them outright is an error rather than a silent wheel without them.

include(CheckLanguage)
if(RNNFAST_CUDA STREQUAL "ON")
  message(FATAL_ERROR "RNNFAST_CUDA=ON, but this version of rnnfast has no CUDA kernels yet: "
                      "use RNNFAST_CUDA=AUTO or OFF")
elseif(RNNFAST_CUDA STREQUAL "AUTO")
  check_language(CUDA)
  if(CMAKE_CUDA_COMPILER)
    message(STATUS "rnnfast: ${CMAKE_CUDA_COMPILER} found; no CUDA kernels to build yet")
  endif()
elseif(NOT RNNFAST_CUDA STREQUAL "OFF")
  message(FATAL_ERROR "RNNFAST_CUDA is '${RNNFAST_CUDA}'; it must be AUTO, ON or OFF")
endif()
