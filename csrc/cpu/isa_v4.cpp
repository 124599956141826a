#define ATTNEXT_ISA v4
#define ATTNEXT_ISA_NAME "x86-64-v4"
#define ATTNEXT_ISA_SYMBOL kV4
#define ATTNEXT_VECTOR_BYTES 64
#define ATTNEXT_REGISTERS 32
#include "cpu/isa.h"
