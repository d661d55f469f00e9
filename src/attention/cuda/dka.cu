// The target side of deep kernel attention: the kernels of dka.h. Launched by dka.rs.
#include "dka.h"

using namespace isopleth;

extern "C" __global__ void __launch_bounds__(dka::THREADS)
    dka_pack(const dka::Sizes n, const float *weight, const float *bias, const float *matrix, void *images) {
    dka::pack_block(n, weight, bias, matrix, images);
}

extern "C" __global__ void __launch_bounds__(dka::THREADS, 2)
    dka_read(const dka::Sizes n, const void *images, const float *sites, const float *tokens, const float *shift,
             float *out) {
    dka::read_block(n, images, sites, tokens, shift, out);
}
