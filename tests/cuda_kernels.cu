// The CUDA kernels in float32 and nothing of torch, for the compiler's warnings.
#include "backward.cuh"
#include "forward.cuh"
#include "prepare.cuh"

namespace attnext::cuda {

template __global__ void fold_weight(const float*, int64_t, int, int, double, float*);
template __global__ void exponentials(Rows<float>, Slots, int, int, int, int, const float*, float*, float*, float*);
template __global__ void forward(const __grid_constant__ Problem<float>, const __grid_constant__ Forward<float>);
template __global__ void step<float, 1>(const __grid_constant__ Problem<float>, const __grid_constant__ Forward<float>);
template __global__ void step<float, 4>(const __grid_constant__ Problem<float>, const __grid_constant__ Forward<float>);
template __global__ void combine(const __grid_constant__ Problem<float>, const __grid_constant__ Forward<float>);
template __global__ void row_sums(const __grid_constant__ Problem<float>, const __grid_constant__ Backward<float>);
template __global__ void score_gradients(const __grid_constant__ Problem<float>,
                                         const __grid_constant__ Backward<float>);
template __global__ void input_gradients(const __grid_constant__ Problem<float>,
                                         const __grid_constant__ Backward<float>);
template __global__ void sum_parts(const float*, const float*, float*, int, int64_t, int, int);
template __global__ void weight_gradient(const float*, int64_t, const float*, int64_t, double, float*, int, int);

}  // namespace attnext::cuda
