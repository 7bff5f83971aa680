# The CPU core as a static library: what the extension module ships, and what the native tests and the
# instruction counts run, is built by the same flags from the same sources.

find_package(OpenMP REQUIRED COMPONENTS CXX)

get_filename_component(RNNFAST_ROOT ${CMAKE_CURRENT_LIST_DIR}/.. ABSOLUTE)
# No contraction: the kernels say where they want an fma, so results cannot depend on the optimiser.
set(RNNFAST_FLAGS -O3 -ffp-contract=off -fno-math-errno -fno-trapping-math -fvisibility=hidden
                  -Wall -Wextra -Wno-psabi -Wno-maybe-uninitialized)

add_library(rnnfast_cpu STATIC
  ${RNNFAST_ROOT}/csrc/cpu/fingerprint.cpp
  ${RNNFAST_ROOT}/csrc/cpu/frozen.cpp
  ${RNNFAST_ROOT}/csrc/cpu/isa.cpp
  ${RNNFAST_ROOT}/csrc/cpu/packs.cpp
  ${RNNFAST_ROOT}/csrc/cpu/peaks.cpp
  ${RNNFAST_ROOT}/csrc/cpu/plan.cpp
  ${RNNFAST_ROOT}/csrc/cpu/team.cpp
  ${RNNFAST_ROOT}/csrc/cpu/workspace.cpp)
target_compile_features(rnnfast_cpu PUBLIC cxx_std_17)
target_include_directories(rnnfast_cpu PUBLIC ${RNNFAST_ROOT}/csrc)
target_compile_options(rnnfast_cpu PRIVATE ${RNNFAST_FLAGS} ${OpenMP_CXX_FLAGS})
set_target_properties(rnnfast_cpu PROPERTIES POSITION_INDEPENDENT_CODE ON)

include(${CMAKE_CURRENT_LIST_DIR}/isa.cmake)
