/* What libmfa uses of <math.h> on macOS; see tools/macos/toolchain.cmake. */
#ifndef _MATH_H
#define _MATH_H

#define INFINITY __builtin_inff()
#define isnan(x) __builtin_isnan(x)
#define isinf(x) __builtin_isinf(x)

double exp(double x);
double exp2(double x);
double fabs(double x);
double frexp(double x, int *exponent);
double ldexp(double x, int exponent);
double log(double x);
double sqrt(double x);
double tanh(double x);

#endif
