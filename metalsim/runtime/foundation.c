/* Foundation, as much of it as talk with Metal needs. */
#define _GNU_SOURCE
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "runtime/object.h"

/* --- Strings, and what consists of one ------------------------------------------------------------ */

struct string {
    struct metalsim_object object;
    char *text;
};

static void finish_string(id self)
{
    struct string *string = (struct string *)self;
    if (string->text)
        memset(string->text, '?', strlen(string->text)); /* so that whoever still reads it is seen */
    free(string->text);
}

METALSIM_CLASS(NSString, struct string, finish_string)
METALSIM_CLASS(NSURL, struct string, finish_string)
METALSIM_CLASS(NSError, struct string, finish_string)

static id make(const struct metalsim_class *class, char *text)
{
    struct string *string = (struct string *)metalsim_object_create(class);
    string->text = text;
    if (!text)
        abort();
    return metalsim_autorelease(&string->object);
}

id metalsim_string(const char *text)
{
    return make(&metalsim_class_NSString, strdup(text));
}

const char *metalsim_text(id string)
{
    return metalsim_object_is(string, &metalsim_class_NSString, "a string") ? ((struct string *)string)->text : "";
}

id metalsim_string_make(id self, SEL selector, const char *text)
{
    (void)self;
    if (!text) {
        metalsim_find("%s: the text is NULL", selector);
        return NULL;
    }
    return metalsim_string(text);
}

const char *metalsim_string_text(id self, SEL selector)
{
    (void)selector;
    return ((struct string *)self)->text;
}

id metalsim_url_make(id self, SEL selector, id path)
{
    (void)self;
    const char *text = metalsim_text(path);
    if (*text != '/')
        metalsim_find("%s \"%s\": a relative path means whatever folder is the current one", selector, text);
    return make(&metalsim_class_NSURL, strdup(text));
}

const char *metalsim_url_path(id url)
{
    return url && metalsim_object_is(url, &metalsim_class_NSURL, "a URL") ? ((struct string *)url)->text : "";
}

id metalsim_error(const char *format, ...)
{
    char *text = NULL;
    va_list values;
    va_start(values, format);
    if (vasprintf(&text, format, values) < 0)
        abort();
    va_end(values);
    return make(&metalsim_class_NSError, text);
}

id metalsim_error_description(id self, SEL selector)
{
    (void)selector;
    return metalsim_string(((struct string *)self)->text);
}

/* --- Arrays --------------------------------------------------------------------------------------- */

struct array {
    struct metalsim_object object;
    size_t count;
    id *objects;
};

static void finish_array(id self)
{
    struct array *array = (struct array *)self;
    for (size_t i = 0; i < array->count; i++)
        metalsim_release(array->objects[i]);
    free(array->objects);
    array->count = 0;
}

METALSIM_CLASS(NSArray, struct array, finish_array)

id metalsim_array_create(id object)
{
    struct array *array = (struct array *)metalsim_object_create(&metalsim_class_NSArray);
    array->objects = malloc(sizeof *array->objects);
    if (!array->objects)
        abort();
    metalsim_retain(object);
    array->objects[0] = object, array->count = 1;
    return &array->object;
}

id metalsim_array_make(id self, SEL selector, id object)
{
    (void)self;
    if (object)
        return metalsim_autorelease(metalsim_array_create(object));
    metalsim_find("%s: the object is nil", selector);
    return NULL;
}

id metalsim_array_object(id self, size_t i)
{
    const struct array *array = (const struct array *)self;
    return array && metalsim_object_is(self, &metalsim_class_NSArray, "an array") && i < array->count
               ? array->objects[i]
               : NULL;
}

id metalsim_array_first(id self, SEL selector)
{
    (void)selector;
    return metalsim_array_object(self, 0);
}
