/* What libmfa uses of <xlocale.h> on macOS; see tools/macos/toolchain.cmake. */
#ifndef _XLOCALE_H
#define _XLOCALE_H

typedef struct _xlocale *locale_t;

#define LC_NUMERIC_MASK (1 << 4)

locale_t newlocale(int mask, const char *name, locale_t base);
locale_t uselocale(locale_t locale);
int freelocale(locale_t locale);

#endif
