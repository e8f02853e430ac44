/* The line of text that stands for a problem in logs, case lists and bench rows:
 *     <pass> <dtype> b<batch> h<q_heads>[/<kv_heads>] q<q_len> kv<kv_len> d<head_dim>[v<value_dim>]
 *     [causal] [lower<int>] [upper<int>] [block_map_q<int>] [block_map_kv<int>] [total_q<int>] [total_kv<int>]
 *     [kv_batch<int>] [page_size<int>] [k_group<int>] [v_group<int>] [scale<float>] [softcap<float>] [dropout<float>]
 *     [k_<type>] [v_<type>], with a type of int8, e4m3, e5m2, int4 and nf4,
 *     [mask_bool] [mask_f32|mask_f16|mask_bf16|mask_f64] [alibi] [sinks] [varlen_q] [varlen_kv] [seqused_k] [leftpad_k]
 *     [cache_batch_idx] [bottom_right] [out_f32] [fast_int8] [metal]
 * causal is upper0; mask_<dtype> is an additive mask of that dtype. What is left out has the value that
 * mfa_problem_init gives. */
#define _GNU_SOURCE
#include <errno.h>
#include <inttypes.h>
#include <locale.h>
#include <math.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/error.h"
#include "core/problem.h"

#if defined(__APPLE__)
#include <xlocale.h>
#endif

#define LINE_MAX_BYTES 768 /* the longest line has about 600 characters */

struct writer {
    char *text;
    size_t capacity, length; /* length may pass the capacity: then it did not fit */
};

__attribute__((format(printf, 2, 3))) static void put(struct writer *writer, const char *format, ...)
{
    const size_t left = writer->length < writer->capacity ? writer->capacity - writer->length : 0;
    va_list arguments;
    va_start(arguments, format);
    const int length = vsnprintf(left ? writer->text + writer->length : NULL, left, format, arguments);
    va_end(arguments);
    writer->length += length > 0 ? (size_t)length : 0;
}

/* As few digits as read back as the same number: 15 are always right for what was written with fewer. */
static void put_number(struct writer *writer, const char *word, double number)
{
    char digits[40];
    for (int precision = 15; precision <= 17; precision++) {
        snprintf(digits, sizeof digits, "%.*g", precision, number);
        if (strtod(digits, NULL) == number)
            break;
    }
    put(writer, " %s%s", word, digits);
}

static void put_line(struct writer *writer, const mfa_problem *given)
{
    mfa_problem rest = *given; /* what is not written yet */
    const mfa_problem *p = &rest;
    put(writer, "%s %s b%" PRId64 " h%" PRId64, mfa_pass_name(p->pass), mfa_dtype_name(p->dtype), p->batch, p->q_heads);
    if (p->kv_heads != p->q_heads)
        put(writer, "/%" PRId64, p->kv_heads);
    put(writer, " q%" PRId64 " kv%" PRId64 " d%" PRId64, p->q_len, p->kv_len, p->head_dim);
    if (p->value_dim != p->head_dim)
        put(writer, "v%" PRId64, p->value_dim);
    if (p->upper == 0 && p->lower == MFA_BAND_OPEN_LOWER) {
        put(writer, " causal");
        rest.upper = MFA_BAND_OPEN_UPPER;
    }
#define INTEGER(word, none) \
    if (p->word != (none))  \
        put(writer, " " #word "%" PRId64, p->word);
#define NUMBER(word, none) \
    if (p->word != (none)) \
        put_number(writer, #word, p->word);
#define TYPE(prefix, member) \
    if (p->member)           \
        put(writer, " " #prefix "%s", mfa_kv_type_name(p->member));
#include "core/options.inc"
    if (p->mask == MFA_MASK_BOOL)
        put(writer, " mask_bool");
    if (p->mask == MFA_MASK_ADDITIVE)
        put(writer, " mask_%s", mfa_dtype_name(p->mask_dtype));
#define WORD(word, member, value, values) \
    if (p->member != 0)                   \
        put(writer, " " #word);
#include "core/options.inc"
}

/* The host program may have set a locale that writes 0,5. */
struct plain_locale {
    locale_t plain, before;
};

/* 0: no memory. */
static int enter_plain_locale(struct plain_locale *locale)
{
    locale->plain = newlocale(LC_NUMERIC_MASK, "C", (locale_t)0);
    if (locale->plain)
        locale->before = uselocale(locale->plain);
    return locale->plain != (locale_t)0;
}

static mfa_status without_locale(void)
{
    return mfa_fail(MFA_OUT_OF_MEMORY, "no memory for a locale that writes numbers with a point");
}

static void leave_plain_locale(struct plain_locale locale)
{
    uselocale(locale.before);
    freelocale(locale.plain);
}

/* Refuses a problem that no line can describe. */
static mfa_status check_printable(const mfa_problem *problem)
{
#define NUMBER(word, none)    \
    if (isnan(problem->word)) \
        return mfa_fail(MFA_INVALID, #word " is NaN; a line of text has numbers only");
#include "core/options.inc"
    return mfa_problem_check_signs(problem);
}

mfa_status mfa_problem_write(const mfa_problem *given, char *text, size_t capacity)
{
    mfa_problem problem;
    struct plain_locale locale;
    mfa_status status = mfa_problem_copy(given, &problem);
    if (status == MFA_OK)
        status = check_printable(&problem);
    if (status != MFA_OK)
        return status;
    if (!enter_plain_locale(&locale))
        return without_locale();
    char line[LINE_MAX_BYTES];
    struct writer writer = {line, sizeof line, 0};
    put_line(&writer, &problem);
    leave_plain_locale(locale);
    if (writer.length >= capacity)
        return mfa_fail(MFA_INVALID, "capacity is %zu; this problem's line needs %zu", capacity, writer.length + 1);
    memcpy(text, line, writer.length + 1);
    return MFA_OK;
}

#define WORD_MAX 64

struct reader {
    const char *at;
    char word[WORD_MAX]; /* "" at the end of the line */
};

static mfa_status next_word(struct reader *reader)
{
    static const char blanks[] = " \t\r\n";
    reader->at += strspn(reader->at, blanks);
    const size_t length = strcspn(reader->at, blanks);
    if (length >= sizeof reader->word)
        return mfa_fail(MFA_INVALID, "\"%.*s...\" is not a word of a problem; they have at most %d characters",
                        (int)mfa_error_fit(reader->at, WORD_MAX - 1), reader->at, WORD_MAX - 1);
    memcpy(reader->word, reader->at, length);
    reader->word[length] = '\0';
    reader->at += length;
    return MFA_OK;
}

static mfa_status unexpected(const struct reader *reader, const char *expected)
{
    if (!*reader->word)
        return mfa_fail(MFA_INVALID, "the problem ends early; expected %s", expected);
    return mfa_fail(MFA_INVALID, "\"%s\" in the problem; expected %s", reader->word, expected);
}

/* Reads the digits at *text, with a sign if that is allowed, and moves *text behind them. */
static int read_integer(const char **text, int sign, int64_t *value)
{
    const char *first = *text + (sign && (**text == '-' || **text == '+'));
    if (*first < '0' || *first > '9')
        return 0;
    char *end;
    errno = 0;
    const long long number = strtoll(*text, &end, 10);
    if (errno)
        return 0;
    *text = end;
    *value = number;
    return 1;
}

/* <prefix><size>, or <prefix><size><separator><size> where a second size is asked for. */
static mfa_status read_size(struct reader *reader, const char *prefix, int64_t *size, char separator, int64_t *second,
                            const char *expected)
{
    const mfa_status status = next_word(reader);
    if (status != MFA_OK)
        return status;
    const char *at = reader->word;
    if (strncmp(at, prefix, strlen(prefix)) != 0)
        return unexpected(reader, expected);
    at += strlen(prefix);
    if (!read_integer(&at, 0, size))
        return unexpected(reader, expected);
    if (second)
        *second = *size;
    if (second && *at == separator) {
        at++;
        if (!read_integer(&at, 0, second))
            return unexpected(reader, expected);
    }
    return *at ? unexpected(reader, expected) : MFA_OK;
}

/* One of the names that `name` gives for 0, 1, ...; -1 if it is none of them. */
static int32_t find_name(const char *word, const char *(*name)(int32_t))
{
    for (int32_t i = 0; name(i); i++)
        if (strcmp(word, name(i)) == 0)
            return i;
    return -1;
}

/* The rest of the word after `prefix`, or NULL if it does not begin with that. */
static const char *rest_after(const char *word, const char *prefix)
{
    const size_t length = strlen(prefix);
    return strncmp(word, prefix, length) == 0 ? word + length : NULL;
}

/* All of `text` is a number. */
static int read_number(const char *text, double *value)
{
    char *end;
    *value = strtod(text, &end);
    return end != text && !*end && !isnan(*value);
}

/* 0: none. */
enum option {
#define INTEGER(word, none) OPTION_##word,
#define NUMBER(word, none) OPTION_##word,
#define TYPE(prefix, member) OPTION_##member,
#define WORD(word, member, value, values) OPTION_##word,
    OPTION_NONE,
#include "core/options.inc"
    OPTION_mask
};

/* Returns which of the above the word sets, if it is one. */
static enum option read_option(const char *word, mfa_problem *problem)
{
    const char *rest;
    if (strcmp(word, "causal") == 0) {
        problem->upper = 0;
        return OPTION_upper;
    }
#define INTEGER(word_of, none)               \
    if ((rest = rest_after(word, #word_of))) \
        return read_integer(&rest, 1, &problem->word_of) && !*rest ? OPTION_##word_of : OPTION_NONE;
#define NUMBER(word_of, none)                \
    if ((rest = rest_after(word, #word_of))) \
        return read_number(rest, &problem->word_of) ? OPTION_##word_of : OPTION_NONE;
#define TYPE(prefix, member)                                                           \
    if ((rest = rest_after(word, #prefix)) && find_name(rest, mfa_kv_type_name) > 0) { \
        problem->member = find_name(rest, mfa_kv_type_name);                           \
        return OPTION_##member;                                                        \
    }
#define WORD(word_of, member, value, values) \
    if (strcmp(word, #word_of) == 0) {       \
        problem->member = (value);           \
        return OPTION_##word_of;             \
    }
#include "core/options.inc"
    if (strcmp(word, "mask_bool") == 0) {
        problem->mask = MFA_MASK_BOOL;
        return OPTION_mask;
    }
    if ((rest = rest_after(word, "mask_")) && find_name(rest, mfa_dtype_name) >= 0) {
        problem->mask = MFA_MASK_ADDITIVE;
        problem->mask_dtype = find_name(rest, mfa_dtype_name);
        return OPTION_mask;
    }
    return OPTION_NONE;
}

static const char options_expected[] = "causal, "
#define INTEGER(word, none) #word "<int>, "
#define NUMBER(word, none) #word "<float>, "
#define TYPE(prefix, member) #prefix "int8, " #prefix "e4m3, " #prefix "e5m2, " #prefix "int4, " #prefix "nf4, "
#define WORD(word, member, value, values) #word ", "
#include "core/options.inc"
                                       "mask_bool, mask_f32, mask_f16, mask_bf16 or mask_f64";

static mfa_status read_options(struct reader *reader, mfa_problem *problem)
{
    for (int seen = 0;;) {
        const mfa_status status = next_word(reader);
        if (status != MFA_OK || !*reader->word)
            return status;
        const enum option option = read_option(reader->word, problem);
        if (!option)
            return unexpected(reader, options_expected);
        if (seen & 1 << option)
            return mfa_fail(MFA_INVALID, "\"%s\" in the problem; this option was given before, and may be given once",
                            reader->word);
        seen |= 1 << option;
    }
}

static mfa_status read_name(struct reader *reader, const char *(*name)(int32_t), int32_t *value, const char *expected)
{
    const mfa_status status = next_word(reader);
    if (status != MFA_OK)
        return status;
    *value = find_name(reader->word, name);
    return *value < 0 ? unexpected(reader, expected) : MFA_OK;
}

static mfa_status read_line(struct reader *reader, mfa_problem *problem)
{
    int32_t pass, dtype;
    int64_t batch, q_heads, kv_heads, q_len, kv_len, head_dim, value_dim;
    mfa_status status = read_name(reader, mfa_pass_name, &pass, "forward or backward");
    if (status == MFA_OK)
        status = read_name(reader, mfa_dtype_name, &dtype, "f32, f16, bf16 or f64");
    if (status == MFA_OK)
        status = read_size(reader, "b", &batch, 0, NULL, "b<batch>");
    if (status == MFA_OK)
        status = read_size(reader, "h", &q_heads, '/', &kv_heads, "h<q_heads> or h<q_heads>/<kv_heads>");
    if (status == MFA_OK)
        status = read_size(reader, "q", &q_len, 0, NULL, "q<q_len>");
    if (status == MFA_OK)
        status = read_size(reader, "kv", &kv_len, 0, NULL, "kv<kv_len>");
    if (status == MFA_OK)
        status = read_size(reader, "d", &head_dim, 'v', &value_dim, "d<head_dim> or d<head_dim>v<value_dim>");
    if (status != MFA_OK)
        return status;
    mfa_problem_make(problem, batch, q_heads, kv_heads, q_len, kv_len, head_dim, value_dim);
    problem->pass = pass;
    problem->dtype = dtype;
    status = read_options(reader, problem);
    mfa_problem_make_dense(problem); /* the options may say the sizes of a block map */
    return status;
}

/* MFA_INVALID if the caller's struct of `size` bytes has no room for an option of the problem. */
static mfa_status check_room(const mfa_problem *problem, size_t size)
{
    if (size == sizeof *problem)
        return MFA_OK;
    mfa_problem caller = *problem;
    char line[LINE_MAX_BYTES], of_caller[LINE_MAX_BYTES];
    caller.size = size;
    mfa_status status = mfa_problem_write(&caller, of_caller, sizeof of_caller);
    if (status == MFA_OK)
        status = mfa_problem_write(problem, line, sizeof line);
    if (status == MFA_OK && strcmp(line, of_caller) != 0)
        return mfa_fail(MFA_INVALID, "\"%s\" has options that an mfa_problem of %zu bytes, the caller's, lacks", line,
                        size);
    return status;
}

mfa_status mfa_problem_read(const char *text, mfa_problem *problem, size_t size)
{
    struct reader reader = {text, ""};
    struct plain_locale locale;
    mfa_problem read;
    if (!enter_plain_locale(&locale))
        return without_locale();
    mfa_status status = read_line(&reader, &read);
    leave_plain_locale(locale);
    if (status == MFA_OK)
        status = check_room(&read, size);
    if (status != MFA_OK)
        return status;
    read.size = size;
    memcpy(problem, &read, size);
    return MFA_OK;
}
