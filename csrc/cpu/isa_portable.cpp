// Whatever the compiler's default target has: SSE2 on x86-64, NEON on aarch64.
#define ATTNEXT_ISA portable
#define ATTNEXT_ISA_NAME "portable"
#define ATTNEXT_ISA_SYMBOL kPortable
#define ATTNEXT_VECTOR_BYTES 16
#define ATTNEXT_REGISTERS 16
#include "cpu/isa.h"
