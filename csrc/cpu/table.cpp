// The table of one path's launchers. It is the only symbol of a path that code outside its namespace uses.
#include "vec.h"

namespace rlhf_fast::RLHF_FAST_PATH {

#define RLHF_FAST_TEXT(x) #x
#define RLHF_FAST_NAME(x) RLHF_FAST_TEXT(x)
#define RLHF_FAST_ENTRY(name, Arguments) &name,

extern const CpuLaunchers launchers = {RLHF_FAST_NAME(RLHF_FAST_PATH),
                                       RLHF_FAST_LAUNCHERS(RLHF_FAST_ENTRY) & float32_product, &short_attention};

}  // namespace rlhf_fast::RLHF_FAST_PATH
