/* Coordinates in the grid of a pass, and parts of a range, all in 32 bits. */

/* A place in the grid of a pass. */
struct grid_coord {
    int batch, head, row, column;
};

/* The place with this number in a grid of these extents; `column` runs fastest. */
METAL_FUNC grid_coord grid_coord_of(uint heads, uint rows, uint columns, uint number)
{
    uint line = number / columns, plane = line / rows, batch = plane / heads;
    return grid_coord{int(batch), int(plane - batch * heads), int(line - plane * rows), int(number - line * columns)};
}

/* Numbers in the grid of a pass are below 2^32 (mfa_metal_tiles_supports). */
METAL_FUNC grid_coord grid_coord_of(constant mfa_metal_grid &grid, uint number)
{
    return grid_coord_of(uint(grid.head), uint(grid.row), uint(grid.column), number);
}

METAL_FUNC grid_coord threadgroup_coord(constant mfa_metal_call &call, uint group)
{
    return grid_coord_of(call.grid, uint(call.first_group) + group);
}

/* Part `part` of `parts` of the numbers [0, count): whole numbers, and as many as in any other part or one more. */
struct part_range {
    uint begin, end;
};

METAL_FUNC part_range part_range_of(uint count, uint part, uint parts)
{
    uint least = count / parts, more = count - least * parts;
    uint begin = least * part + min(part, more);
    return part_range{begin, begin + least + (part < more ? 1 : 0)};
}
