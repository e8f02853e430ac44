/* What libmfa uses of <locale.h> is in <xlocale.h> on macOS. */
#ifndef _LOCALE_H
#define _LOCALE_H

#endif
