/* Arrays in threadgroup memory that a kernel declares. The memory is the runtime's, which knows each array of a kernel
 * by its name (parameters.c). */
#ifndef METALSIM_ARRAY_H
#define METALSIM_ARRAY_H

namespace metalsim
{

template <class T, ulong count> struct threadgroup_array {
    typedef threadgroup T memory[count];
    static METAL_FUNC memory &named(const char *name)
    {
        return *(memory *)find_array(name);
    }
};

} // namespace metalsim

/* In Metal: alignas(16) threadgroup type name[count]; in the outermost scope of a kernel. */
#define THREADGROUP_ARRAY(type, name, count) \
    metalsim::threadgroup_array<type, (count)>::memory &name = metalsim::threadgroup_array<type, (count)>::named(#name)
#endif
