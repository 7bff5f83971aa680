#include "cpu/kernels.cpp"
