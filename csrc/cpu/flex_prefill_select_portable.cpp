#include "flex_prefill_select_probe.h"

namespace sparse_attn {

const ProbeKernel kProbePortable = probe_kernel<FloatScorer>();

}  // namespace sparse_attn
