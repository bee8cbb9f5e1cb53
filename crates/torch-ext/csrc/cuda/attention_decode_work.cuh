// How the work of attention_decode.cu is cut into items and shared out.
//
// There are three ways to cut. Where a context's length and the model alone say where, a result does not
// depend on what else is in the batch; a block then takes whole items, as many as any other or one
// more. Cut evenly, every block takes the same number of tiles, wherever that ends, and the contexts at
// its two ends are shared with the blocks beside it: no block works longer than another, and most
// contexts need no adding up. That is for more items than blocks. An item also takes some time of its
// own, however short it is: as much as LEAD tiles, which stand before its first one in the list. And
// contexts that are about as long as one another, whose KV heads are as many as blocks, or twice as many
// and so on, or a little fewer, are not cut: none needs adding up. The last two ways depend on the batch.
//
// An empty context has no items.

static const int TILE = 16; // tokens
// A context of at most this many tiles is one split; longer ones have splits of at least MIN_SPLIT.
static const int ONE_SPLIT = 24;
static const int MIN_SPLIT = 16;
static const int LEAD = 2;
// How many tiles what a block has to add up takes as long as, where all is cut evenly.
static const int ADDING_UP = 8;
static_assert(MIN_SPLIT % WARPS == 0, "a split is as many tiles for each warp");

// Nothing of a thread block's keys is on its way before it knows where it begins, and a division takes as long as thirty
// additions: so there are few.
struct Params {
    const elem *q, *k, *v;
    const int *block_tables;
    int kv_heads, groups, ratio, rows, width, blocks, block_size, window, max_splits;

    /// Which of a sequence's blocks a token is in, and where in there. Without ANY_BLOCK block sizes are powers of two.
    DEVICE int kv_block(int token) const {
        return ANY_BLOCK ? token / block_size : token >> (31 - __clz(block_size));
    }
    DEVICE int place_in_block(int token) const { return ANY_BLOCK ? token % block_size : token & (block_size - 1); }
    /// Whose group `head` is, which counts groups.
    DEVICE int kv_head(int head) const { return groups == 1 ? head : head / groups; }
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
        splits = min(tiles, 1);
        if (tiles > MIN_SPLIT * p.max_splits) {
            per = (tiles + p.max_splits - 1) / p.max_splits;
            per = (per + WARPS - 1) / WARPS * WARPS;
            splits = (tiles + per - 1) / per;
        } else if (tiles > ONE_SPLIT) {
            per = MIN_SPLIT;
            splits = (tiles + MIN_SPLIT - 1) / MIN_SPLIT;
        }
    }
};

/// A thread block's share of all the work, in items, or, cut evenly, in tiles and leads.
struct Share {
    bool even;
    bool whole; // no context is cut
    i64 total, begin, end;

    /// Of a head: how many `splits` there are, of how many contexts that are not empty, how many `tiles` and leads, and what the
    /// `longest` of them has. `least_even`: tiles of a block from which contexts of one split each are cut evenly; 0: none is.
    DEVICE void cut(int least_even, int splits, int contexts, int heads, int tiles, int longest) {
        i64 work = (i64)tiles * heads, blocks = gridDim.x;
        bool many = (i64)splits * heads > blocks;
        // Contexts that are one split each need no adding up unless they are cut evenly: for those it must be worth it.
        even = least_even > 0 && many && (splits > contexts || work >= least_even * blocks);
        whole = false;
        if (!even || splits == contexts) return;
        u32 each = ((u32)(contexts * heads) + gridDim.x - 1) / gridDim.x;
        whole = (i64)each * longest * blocks <= work + ADDING_UP * blocks;
        even = !whole;
    }

    /// Fewer than blocks: the first blocks take one each. Were they every fourth block, say, of two a multiprocessor, only
    /// every fourth multiprocessor would have work.
    DEVICE i64 begin_of(int block) const {
        if (total < gridDim.x) return min(total, (i64)block);
        // There are fewer than 1024 blocks.
        return total < 1 << 22 ? (u32)total * (u32)block / gridDim.x : total * block / gridDim.x;
    }
    /// Whose share this is part of, cut evenly.
    DEVICE int block_of(i64 at) const { return (int)(((at + 1) * gridDim.x - 1) / total); }
};

/// A place in the list of items: sequence by sequence, head by head, range by range.
struct Cursor {
    // In the share's unit: where this block's part begins, and where this head's first item does.
    i64 at, first;
    int seq, head;
    int start, context, first_tile, tiles, per, splits;
    int from, to; // the item's range of its context, in tiles
    int tile;     // this warp's next one

    DEVICE void enter(const int *contexts, const Params &p) {
        Cut cut(contexts[seq], p);
        start = cut.start, context = cut.context, first_tile = cut.first_tile;
        tiles = cut.tiles, per = cut.per, splits = cut.splits;
    }
    /// What a head has in the list.
    DEVICE int span(const Share &share) const { return share.even ? LEAD + tiles : splits; }
    /// Takes the part that begins at `at`. Cut evenly, no share is so short that it ends before its first tile; where its last
    /// item does, that is the next block's.
    DEVICE void aim(const Share &share, int warp) {
        int offset = (int)(at - first);
        if (share.even) {
            from = max(0, offset - LEAD);
            to = (int)min((i64)tiles, share.end - first - LEAD);
            if (to <= from) at = share.end;
        } else {
            from = offset * per, to = min(tiles, from + per);
        }
        tile = from + warp;
    }
    /// To the item after this one.
    DEVICE void advance(const Share &share, const int *contexts, const Params &p, int warp) {
        at = share.even ? first + span(share) : at + 1;
        if (at >= share.end) return;
        if (share.even || at == first + splits) {
            first = at;
            if (++head == p.kv_heads * p.groups) {
                head = 0;
                // There is more, or the share had ended.
                do {
                    ++seq;
                    enter(contexts, p);
                } while (tiles == 0);
            }
        }
        aim(share, warp);
    }
    DEVICE bool is_whole() const { return from == 0 && to >= tiles; }
    /// Whether the context's newest token is here.
    DEVICE bool has_end() const { return to == tiles; }
};
