// How the work of attention_decode.cu is cut into items and shared out.
//
// There are two ways to cut. Where a context's length and the model alone say where, a result does not
// depend on what else is in the batch; a block then takes whole items, as many as any other or one
// more. Cut evenly, every block takes the same number of tiles, wherever that ends, and the contexts at
// its two ends are shared with the blocks beside it: no block works longer than another, and most
// contexts need no adding up. That is for more items than blocks.

static const int WARPS = 4;
static const int TILE = 16; // tokens
// A context of at most this many tiles is one split; longer ones have splits of at least MIN_SPLIT.
static const int ONE_SPLIT = 24;
static const int MIN_SPLIT = 16;

struct Params {
    const elem *q, *k, *v;
    const int *block_tables;
    int kv_heads, groups, ratio, rows, width, blocks, block_size, window, max_splits;
};

/// What one sequence needs, and how it is cut.
struct Cut {
    int start, context, first_tile, tiles, per, splits;

    DEVICE Cut(int context_len, const Params &p) {
        context = context_len;
        start = p.window > 0 && context > p.window ? context - p.window : 0;
        first_tile = start / TILE;
        tiles = (context + TILE - 1) / TILE - first_tile;
        per = tiles;
        splits = 1;
        if (tiles > ONE_SPLIT) {
            per = max(MIN_SPLIT, (tiles + p.max_splits - 1) / p.max_splits);
            per = (per + WARPS - 1) / WARPS * WARPS;
            splits = (tiles + per - 1) / per;
        }
    }
};

/// A thread block's share of all the work, in items, or, cut evenly, in tiles.
struct Share {
    bool even;
    i64 total, begin, end;

    DEVICE i64 begin_of(int block) const { return total * block / gridDim.x; }
    /// Whose share this is part of.
    DEVICE int block_of(i64 at) const { return (int)(((at + 1) * gridDim.x - 1) / total); }
};

/// A place in the list of items: sequence by sequence, head by head, range by range.
struct Cursor {
    i64 at; // in the share's unit
    int seq, head, split;
    int start, context, first_tile, tiles, per, splits;
    int from, to; // the item's range of its context, in tiles
    int tile;     // this warp's next one

    DEVICE void enter(const int *contexts, const Params &p) {
        Cut cut(contexts[seq], p);
        start = cut.start, context = cut.context, first_tile = cut.first_tile;
        tiles = cut.tiles, per = cut.per, splits = cut.splits;
    }
    /// Even an empty context has an item: its output is zero.
    DEVICE int span() const { return max(tiles, 1); }
    DEVICE void aim(const Share &share, int warp) {
        if (share.even) to = (int)min((i64)span(), from + share.end - at);
        else from = split * per, to = min(tiles, from + per);
        tile = from + warp;
    }
    /// To the item after this one.
    DEVICE void advance(const Share &share, const int *contexts, const Params &p, int warp) {
        at += share.even ? to - from : 1;
        if (at >= share.end) return;
        from = 0;
        if (share.even || ++split == splits) {
            split = 0;
            if (++head == p.kv_heads * p.groups) {
                head = 0;
                ++seq;
                enter(contexts, p);
            }
        }
        aim(share, warp);
    }
    DEVICE bool is_whole() const { return from == 0 && to >= tiles; }
    /// Whether the context's newest token is here.
    DEVICE bool has_end() const { return context > 0 && to == tiles; }
};
