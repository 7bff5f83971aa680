# The CUDA kernels on the processor, for tests: never part of a wheel.

option(RNNFAST_SANITIZE "With AddressSanitizer and UBSan; the process must then preload libasan" OFF)
option(RNNFAST_EMULATOR "Build the CUDA kernels for the emulator, as the module _emulated" OFF)
if(RNNFAST_EMULATOR)
  pybind11_add_module(_emulated MODULE NO_EXTRAS
    csrc/emu/bindings.cpp
    csrc/emu/kernels.cpp
    csrc/emu/simt.cpp
    csrc/cuda/plan.cpp)
  target_compile_features(_emulated PRIVATE cxx_std_17)
  target_link_libraries(_emulated PRIVATE ${CMAKE_DL_LIBS})
  # Jumps between stacks are what it does, so the checked longjmp must not be used.
  target_compile_options(_emulated PRIVATE -O2 -U_FORTIFY_SOURCE -ffp-contract=off -fvisibility=hidden
                         -Wall -Wextra -Wno-maybe-uninitialized)
  if(RNNFAST_SANITIZE)
    set(sanitizers -fsanitize=address,undefined -fno-sanitize-recover=undefined -fno-sanitize=vptr)
    target_compile_options(_emulated PRIVATE -O1 -g1 ${sanitizers})
    target_link_options(_emulated PRIVATE ${sanitizers})
  endif()
endif()
