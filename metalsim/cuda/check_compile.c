/* Whether nvcc compiles the kernels, on a machine without a GPU: each of them, with and without options, for the
 * narrowest and the widest columns. Wants METALSIM_CUDA_ARCH to be set.
 *
 *     check_compile [--shard K/N] */
#include <stdio.h>
#include <stdlib.h>

#include "metal/gpu.h"
#include "metal/source.h"
#include "mfa.h"
#include "support/arguments.h"
#include "support/report.h"

static const struct {
    int dtype, dim, features, mask_dtype, family, k_type, v_type;
} variants[] = {
    {MFA_F16, 64, 0, 0, 7, 0, 0},
    {MFA_F16, 128, MFA_FEATURE_VARLEN | MFA_FEATURE_PAGED, 0, 7, 0, 0},
    {MFA_F32, 512, MFA_FEATURE_BAND | MFA_FEATURE_MASK_BOOL | MFA_FEATURE_DROPOUT | MFA_FEATURE_BLOCK_MAP, 0, 7, 0, 0},
    {MFA_BF16, 128,
     MFA_FEATURE_BAND | MFA_FEATURE_MASK_ADDITIVE | MFA_FEATURE_SOFTCAP | MFA_FEATURE_BLOCK_MAP | MFA_FEATURE_VARLEN,
     MFA_F32, 7, 0, 0},
    {MFA_BF16, 256, MFA_FEATURE_MASK_ADDITIVE | MFA_FEATURE_ALIBI | MFA_FEATURE_SINKS | MFA_FEATURE_DROPOUT, MFA_BF16,
     9, 0, 0},
    {MFA_F16, 128, 0, 0, 7, MFA_KV_INT8, MFA_KV_INT4},
    {MFA_BF16, 64, MFA_FEATURE_VARLEN | MFA_FEATURE_PAGED, 0, 9, MFA_KV_E4M3, MFA_KV_SAME},
    {MFA_F32, 32, MFA_FEATURE_DROPOUT, 0, 7, MFA_KV_NF4, MFA_KV_E5M2},
    {MFA_F16, 136, MFA_FEATURE_VARLEN | MFA_FEATURE_OUT_F32, 0, 7, 0, 0},
    {MFA_BF16, 64, MFA_FEATURE_OUT_F32, 0, 9, 0, 0},
};

int main(int count, char **words)
{
    struct arguments arguments;
    if (!arguments_parse(&arguments, count, words, NULL))
        return 2;
    const char *cache = getenv("MFA_CACHE");
    const struct gpu_settings settings = {.cache = cache ? cache : "build/metalsim"};
    gpu_set(&settings);
    report_begin("check_compile", 1);
    for (size_t v = 0; v < sizeof variants / sizeof *variants; v++)
        for (int n = 0; n < 2 * MFA_METAL_KERNELS; n++) {
            const enum mfa_metal_kernel kernel = (enum mfa_metal_kernel)(n / 2);
            struct mfa_key key = {.pass = n % 2,
                                  .dtype = variants[v].dtype,
                                  .head_dim = variants[v].dim,
                                  .value_dim = variants[v].dim,
                                  .features = variants[v].features,
                                  .mask_dtype = variants[v].mask_dtype,
                                  .k_type = variants[v].k_type,
                                  .v_type = variants[v].v_type};
            char *text;
            snprintf(key.machine, sizeof key.machine, "apple%d", variants[v].family);
            if (mfa_metal_source_write(&key, kernel, "#define COUNT_TILES\n", &text) != MFA_OK)
                continue; /* not a kernel of this pass, or not without a mask or with codes */
            if (!arguments_take(&arguments)) {
                free(text);
                continue;
            }
            const struct gpu_launch launch = {.text = text, .function = mfa_metal_source_function(kernel)};
            const char *why = gpu_run(&launch);
            if (why)
                report_fail("%s", why);
            else
                report_pass();
            free(text);
        }
    return report_end();
}
