// The one symbol of an instruction set that the Rust side names.
#include "kernels.h"

extern "C" {
extern const TeKernels TE(kernels);
const TeKernels TE(kernels) = {
    TE(pack),      TE(linear), TE(embedding), TE(rms_norm),  TE(silu_mul), TE(rope),
    TE(attention_scratch), TE(attention), TE(exp), TE(roof_read), TE(roof_fma),
};
}
