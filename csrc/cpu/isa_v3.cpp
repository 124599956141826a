#define ATTNEXT_ISA v3
#define ATTNEXT_ISA_NAME "x86-64-v3"
#define ATTNEXT_ISA_SYMBOL kV3
#define ATTNEXT_VECTOR_BYTES 32
#define ATTNEXT_REGISTERS 16
#include "cpu/isa.h"
