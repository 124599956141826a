// The CUDA kernels in float32 and nothing of torch, for the compiler's warnings.
#include "backward.cuh"
#include "dot.cuh"
#include "dot_backward.cuh"
#include "forward.cuh"
#include "prepare.cuh"
#include "step_gradients.cuh"

namespace attnext::cuda {

template __global__ void fold_weight(const float*, int64_t, int64_t, int, int, double, float*);
template __global__ void exponentials(Rows<float>, Slots, int, int, int, int, Weights, float*, float*, float*);
template __global__ void forward(const __grid_constant__ Problem<float>, const __grid_constant__ Forward<float>);
template __global__ void step<float, 1>(const __grid_constant__ Problem<float>, const __grid_constant__ Forward<float>);
template __global__ void step<float, 4>(const __grid_constant__ Problem<float>, const __grid_constant__ Forward<float>);
template __global__ void combine(const __grid_constant__ Problem<float>, const __grid_constant__ Forward<float>);
template __global__ void row_sums(const __grid_constant__ Problem<float>, const __grid_constant__ Backward<float>);
template __global__ void score_gradients(const __grid_constant__ Problem<float>,
                                         const __grid_constant__ Backward<float>);
template __global__ void input_gradients(const __grid_constant__ Problem<float>,
                                         const __grid_constant__ Backward<float>);
template __global__ void sum_parts(const float*, Weights, float*, int, int64_t, int, int);
template __global__ void weight_gradient(const float*, int64_t, int64_t, const float*, int64_t, double, float*, int,
                                         int);
template __global__ void dot_step<float, 1>(const __grid_constant__ Problem<float>,
                                            const __grid_constant__ Forward<float>, const __grid_constant__ DotTile);
template __global__ void dot_step<float, 8>(const __grid_constant__ Problem<float>,
                                            const __grid_constant__ Forward<float>, const __grid_constant__ DotTile);
template __global__ void dot_forward(const __grid_constant__ Problem<float>, const __grid_constant__ Forward<float>);
template __global__ void dot_step_gradients<float, 1>(const __grid_constant__ Problem<float>,
                                                      const __grid_constant__ Backward<float>,
                                                      const __grid_constant__ DotGradients<float>,
                                                      const __grid_constant__ DotTile);
template __global__ void dot_step_gradients<float, 8>(const __grid_constant__ Problem<float>,
                                                      const __grid_constant__ Backward<float>,
                                                      const __grid_constant__ DotGradients<float>,
                                                      const __grid_constant__ DotTile);
template __global__ void dot_score_gradients(const __grid_constant__ Problem<float>,
                                             const __grid_constant__ Backward<float>);
template __global__ void dot_input_gradients(const __grid_constant__ Problem<float>,
                                             const __grid_constant__ Backward<float>,
                                             const __grid_constant__ DotGradients<float>);
template __global__ void add_parts(const float*, float*, int, int64_t);
template __global__ void step_scores(const __grid_constant__ Step<float>, float*);
template __global__ void step_context(const __grid_constant__ Step<float>, const float*, float*, float*);
template __global__ void step_value_gradients(const __grid_constant__ Step<float>,
                                              const __grid_constant__ StepBackward<float>);
template __global__ void step_score_gradients(const __grid_constant__ Step<float>,
                                              const __grid_constant__ StepBackward<float>);
template __global__ void step_input_gradients(const __grid_constant__ Step<float>,
                                              const __grid_constant__ StepBackward<float>);
template __global__ void step_totals(const __grid_constant__ Step<float>, const __grid_constant__ StepBackward<float>,
                                     int64_t);

}  // namespace attnext::cuda
