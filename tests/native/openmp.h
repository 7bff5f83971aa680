// The little of an OpenMP runtime that the core uses, as a stand-in for libgomp in the native programs.
//
// ThreadSanitizer sees the synchronisation of code that it compiled and of pthreads, and takes libgomp's own
// barriers, which are futexes, for none: it would report a race at every end of a parallel region. Here
// a region starts its threads and joins them, which the sanitizer understands exactly, so what it
// does report is in the core: csrc/cpu/team.cpp and the barrier between steps are compiled unchanged.
#pragma once

// How many regions so far were run by more than one thread, in the whole process.
int regions_with_several_threads();
