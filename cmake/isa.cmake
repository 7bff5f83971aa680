# The kernels, compiled once per instruction set. Only these objects get the set's flags: everything else,
# and with it the start of the program, runs on any processor of the family.

include(CheckCXXCompilerFlag)

function(rnnfast_add_isa name)
  cmake_parse_arguments(ISA "" "" "FLAGS" ${ARGN})
  add_library(kernels_${name} OBJECT ${RNNFAST_ROOT}/csrc/cpu/kernels.cpp)
  target_compile_features(kernels_${name} PRIVATE cxx_std_17)
  target_compile_definitions(kernels_${name} PRIVATE RNNFAST_ISA=${name})
  target_compile_options(kernels_${name} PRIVATE ${RNNFAST_FLAGS} ${ISA_FLAGS})
  set_target_properties(kernels_${name} PROPERTIES POSITION_INDEPENDENT_CODE ON)
  string(TOUPPER ${name} upper)
  target_sources(rnnfast_cpu PRIVATE $<TARGET_OBJECTS:kernels_${name}>)
  target_compile_definitions(rnnfast_cpu PRIVATE RNNFAST_BUILT_${upper})
  set(RNNFAST_ISAS ${RNNFAST_ISAS} kernels_${name} PARENT_SCOPE)
endfunction()

rnnfast_add_isa(baseline)
if(CMAKE_SYSTEM_PROCESSOR MATCHES "^(x86_64|AMD64|amd64)$")
  rnnfast_add_isa(avx2 FLAGS -mavx2 -mfma)
  set(avx512 -mavx512f -mavx2 -mfma -mprefer-vector-width=512)
  rnnfast_add_isa(avx512 FLAGS ${avx512})
  check_cxx_compiler_flag(-mavx512bf16 RNNFAST_HAS_AVX512BF16)
  if(RNNFAST_HAS_AVX512BF16)
    rnnfast_add_isa(avx512bf16 FLAGS ${avx512} -mavx512bw -mavx512vl -mavx512bf16)
  endif()
endif()
