"""Define the Triton kernels behind gcvit.model.kernels.window_attention. Load this file only if Triton is installed.

A kernel is run by many programs at once. A program finds its share of the work by its id, loads tiles (small
matrices, sides powers of two) from addresses it computes, works on them on chip, and stores the results; a mask
says which elements of a tile exist. Names in capitals are known at compile time: branches on them cost nothing.

Shape letters are those of gcvit.model.attention. The N tokens of a window are padded to whole tiles: tokens
that do not exist (padding, or positions beyond the map) are loaded as zeros, never stored, and as keys weigh
exp(-inf) = 0. Exponentials are taken to base 2, the one the hardware has: scores, their log-sum-exp and the bias
are in units of log(2), hence LOG2_E. The bias is laid out for these kernels by those of bias_kernels.py.

A window is named by one number, counted image by image. Where a program serves several windows, they follow
each other ("a run"), so that data of the head alone stay on chip. Runs never change a sum's order from one launch
to the next: no atomics, the same bits every time.
"""

# mypy: disable-error-code="no-untyped-def, import-untyped, import-not-found"
# A kernel's arguments are no Python values: a Tensor arrives as a pointer, and every number as one of the chip's.

import triton
import triton.language as tl

from gcvit.model.kernels.bias_kernels import LOG2_E


@triton.jit
def find_run(run, num_images, num_windows, images_per_run, runs_per_image):
    """Find the windows [first, last) of a run: of several images, or of a part of one (then images_per_run is 1)."""
    first_image = run // runs_per_image * images_per_run
    windows_per_run = tl.cdiv(images_per_run * num_windows, runs_per_image)
    first = first_image * num_windows + run % runs_per_image * windows_per_run
    last = tl.minimum(first_image + images_per_run, num_images) * num_windows
    return first, tl.minimum(first + windows_per_run, last)


# Whether TRITON_INTERPRET=1 was set before anything loaded Triton: programs then run one by one, in NumPy.
IS_INTERPRETED = tl.constexpr(not any(isinstance(function, triton.JITFunction) for function in (find_run, tl.sum)))


@triton.jit
def multiply(a, b):
    """Multiply the matrices a b in fp32: on tensor cores in half precision, in full precision otherwise."""
    if IS_INTERPRETED:  # The interpreter would take the bits of bf16 for integers.
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, input_precision="ieee")


@triton.jit
def find_tokens(window, first_token, height, width, WINDOW: tl.constexpr, BLOCK: tl.constexpr):
    """Find BLOCK tokens of a window of an image, from first_token on: number, position (y, x), whether each exists."""
    token = first_token + tl.arange(0, BLOCK)
    num_columns = tl.cdiv(width, WINDOW)
    y = window // num_columns * WINDOW + token // WINDOW
    x = window % num_columns * WINDOW + token % WINDOW
    return token, y, x, (token < WINDOW * WINDOW) & (y < height) & (x < width)


@triton.jit
def load_rows(pointer, offsets, exists, HEAD_DIM: tl.constexpr):
    """Load one head's channels at the given offsets, (BLOCK, d); zeros where no token exists."""
    return tl.load(pointer + offsets[:, None] + tl.arange(0, HEAD_DIM)[None, :], mask=exists[:, None], other=0.0)


@triton.jit
def store_rows(pointer, offsets, exists, rows, HEAD_DIM: tl.constexpr):
    pointers = pointer + offsets[:, None] + tl.arange(0, HEAD_DIM)[None, :]
    tl.store(pointers, rows.to(pointer.dtype.element_ty), mask=exists[:, None])


@triton.jit
def load_bias(bias, head, query, key, PADDED: tl.constexpr):
    """Load the bias of a tile of (query, key) pairs. Its memory is padded too: it needs no mask."""
    return tl.load(bias + head * PADDED * PADDED + query[:, None] * PADDED + key[None, :]).to(tl.float32)


@triton.jit
def score(q, k, bias_tile, key_exists, scale, RAGGED: tl.constexpr):
    """Compute scale * q k^T + bias in units of log(2), fp32; -inf for keys that do not exist."""
    scores = multiply(q, tl.trans(k)) * (scale * LOG2_E) + bias_tile
    # The bias hides a window's padding, but does not know where the map ends.
    return tl.where(key_exists[None, :], scores, float("-inf")) if RAGGED else scores


@triton.jit(do_not_specialize=["num_images", "images_per_run", "runs_per_image"])
def attend_windows(
    parts,  # (B, H, W, 3C) q, k, v; or (B, H, W, 2C) k, v
    queries,  # (B, N, C) where SHARED_QUERIES
    bias,  # (h, PADDED, PADDED)
    out,  # (B, H, W, C)
    lse,  # (B*n, h, N), the log-sum-exp of every query's scores, for the backward pass
    scale,
    num_images,
    height,
    width,
    stride_b,
    stride_y,
    stride_x,
    images_per_run,
    runs_per_image,
    NUM_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    WINDOW: tl.constexpr,
    SHARED_QUERIES: tl.constexpr,
    RAGGED: tl.constexpr,
    PADDED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Compute the attention of one head and one tile of queries, over the windows of a run.

    Keys come tile by tile. The state of the softmax over them is the running maximum, the sum of exponentials below
    it and the weighted sum of values; a new maximum rescales both sums (Milakov & Gimelshein, 2018).
    """
    NUM_TOKENS: tl.constexpr = WINDOW * WINDOW
    NUM_TILES: tl.constexpr = (NUM_TOKENS + BLOCK - 1) // BLOCK
    C: tl.constexpr = NUM_HEADS * HEAD_DIM
    KEYS: tl.constexpr = 0 if SHARED_QUERIES else C
    # Neighbouring heads share cache lines, neighbouring tiles keys and values: their programs run side by side.
    head = tl.program_id(0) % NUM_HEADS
    first_query = tl.program_id(0) // NUM_HEADS % NUM_TILES * BLOCK
    run = tl.program_id(0) // NUM_HEADS // NUM_TILES
    num_windows = tl.cdiv(height, WINDOW) * tl.cdiv(width, WINDOW)
    first, last = find_run(run, num_images, num_windows, images_per_run, runs_per_image)

    first_bias = load_bias(bias, head, first_query + tl.arange(0, BLOCK), tl.arange(0, BLOCK), PADDED)
    for window in range(first, last):
        image, place = window // num_windows, window % num_windows
        image_parts = parts + image.to(tl.int64) * stride_b + head * HEAD_DIM
        query, y, x, query_exists = find_tokens(place, first_query, height, width, WINDOW, BLOCK)
        if SHARED_QUERIES:
            image_queries = queries + image.to(tl.int64) * (NUM_TOKENS * C) + head * HEAD_DIM
            q = load_rows(image_queries, query * C, query_exists, HEAD_DIM)
        else:
            q = load_rows(image_parts, y * stride_y + x * stride_x, query_exists, HEAD_DIM)
        out_offsets = (y * width + x) * C

        # The first tile holds the window's first token, which always exists: the maximum is finite from here on.
        _, y, x, exists = find_tokens(place, 0, height, width, WINDOW, BLOCK)
        offsets = y * stride_y + x * stride_x
        k = load_rows(image_parts + KEYS, offsets, exists, HEAD_DIM)
        v = load_rows(image_parts + KEYS + C, offsets, exists, HEAD_DIM)
        scores = score(q, k, first_bias, exists, scale, RAGGED)
        maximum = tl.max(scores, axis=1)
        weights = tl.exp2(scores - maximum[:, None])
        total = tl.sum(weights, axis=1)
        mean = multiply(weights.to(v.dtype), v)
        for key_tile in range(1, NUM_TILES):
            key, y, x, exists = find_tokens(place, key_tile * BLOCK, height, width, WINDOW, BLOCK)
            offsets = y * stride_y + x * stride_x
            k = load_rows(image_parts + KEYS, offsets, exists, HEAD_DIM)
            v = load_rows(image_parts + KEYS + C, offsets, exists, HEAD_DIM)
            scores = score(q, k, load_bias(bias, head, query, key, PADDED), exists, scale, RAGGED)
            new_maximum = tl.maximum(maximum, tl.max(scores, axis=1))
            weights = tl.exp2(scores - new_maximum[:, None])
            shrink = tl.exp2(maximum - new_maximum)
            total = total * shrink + tl.sum(weights, axis=1)
            mean = mean * shrink[:, None] + multiply(weights.to(v.dtype), v)
            maximum = new_maximum

        image_out = out + image.to(tl.int64) * height * width * C + head * HEAD_DIM
        store_rows(image_out, out_offsets, query_exists, mean / total[:, None], HEAD_DIM)
        lse_row = lse + (window * NUM_HEADS + head) * NUM_TOKENS
        tl.store(lse_row + query, maximum + tl.log2(total), mask=query < NUM_TOKENS)


@triton.jit(do_not_specialize=["num_images", "images_per_run", "runs_per_image"])
def backward_pairs(
    parts,
    queries,
    bias,
    out,
    lse,
    d_out,  # (B, H, W, C)
    d_parts,  # as parts, contiguous; written where WHOLE
    d_queries,  # (B, runs_per_image, N, C), to be summed over the runs; written where WHOLE and SHARED_QUERIES
    d_bias,  # (number of runs, h, PADDED, PADDED) fp32, to be summed over the runs
    scale,
    num_images,
    height,
    width,
    stride_b,
    stride_y,
    stride_x,
    images_per_run,
    runs_per_image,
    NUM_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    WINDOW: tl.constexpr,
    SHARED_QUERIES: tl.constexpr,
    RAGGED: tl.constexpr,
    PADDED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Compute the bias's gradient of one head and one tile of (query, key) pairs, summed on chip over a run's windows.

    If one tile holds the WHOLE window, the other gradients follow from the same numbers, and this kernel is all of the
    backward pass. Otherwise backward_tiles computes the rest.
    """
    NUM_TOKENS: tl.constexpr = WINDOW * WINDOW
    NUM_TILES: tl.constexpr = (NUM_TOKENS + BLOCK - 1) // BLOCK
    WHOLE: tl.constexpr = NUM_TILES == 1
    C: tl.constexpr = NUM_HEADS * HEAD_DIM
    KEYS: tl.constexpr = 0 if SHARED_QUERIES else C
    head = tl.program_id(0) % NUM_HEADS
    first_query = tl.program_id(0) // NUM_HEADS % NUM_TILES * BLOCK
    first_key = tl.program_id(0) // NUM_HEADS // NUM_TILES % NUM_TILES * BLOCK
    run = tl.program_id(0) // NUM_HEADS // NUM_TILES // NUM_TILES
    num_windows = tl.cdiv(height, WINDOW) * tl.cdiv(width, WINDOW)
    first, last = find_run(run, num_images, num_windows, images_per_run, runs_per_image)

    pair_query, pair_key = first_query + tl.arange(0, BLOCK), first_key + tl.arange(0, BLOCK)
    bias_tile = load_bias(bias, head, pair_query, pair_key, PADDED)
    d_bias_sum = tl.zeros((BLOCK, BLOCK), tl.float32)
    d_query_sum = tl.zeros((BLOCK, HEAD_DIM), tl.float32)
    for window in range(first, last):
        image, place = window // num_windows, window % num_windows
        image_parts = parts + image.to(tl.int64) * stride_b + head * HEAD_DIM
        out_start = image.to(tl.int64) * height * width * C + head * HEAD_DIM
        query, y, x, query_exists = find_tokens(place, first_query, height, width, WINDOW, BLOCK)
        query_place = y * width + x
        if SHARED_QUERIES:
            image_queries = queries + image.to(tl.int64) * (NUM_TOKENS * C) + head * HEAD_DIM
            q = load_rows(image_queries, query * C, query_exists, HEAD_DIM)
        else:
            q = load_rows(image_parts, y * stride_y + x * stride_x, query_exists, HEAD_DIM)
        d_mean = load_rows(d_out + out_start, query_place * C, query_exists, HEAD_DIM)
        lse_row = lse + (window * NUM_HEADS + head) * NUM_TOKENS
        query_lse = tl.load(lse_row + query, mask=query < NUM_TOKENS, other=0.0)
        _, y, x, key_exists = find_tokens(place, first_key, height, width, WINDOW, BLOCK)
        key_place = y * width + x
        offsets = y * stride_y + x * stride_x
        k = load_rows(image_parts + KEYS, offsets, key_exists, HEAD_DIM)
        v = load_rows(image_parts + KEYS + C, offsets, key_exists, HEAD_DIM)

        weights = tl.exp2(score(q, k, bias_tile, key_exists, scale, RAGGED) - query_lse[:, None])
        d_weights = multiply(d_mean, tl.trans(v))
        # A softmax's gradient is centred on the weighted mean of d_weights, which is d_mean . mean, too.
        if WHOLE:
            centre = tl.sum(weights * d_weights, axis=1)
        else:
            mean = load_rows(out + out_start, query_place * C, query_exists, HEAD_DIM)
            centre = tl.sum(d_mean.to(tl.float32) * mean.to(tl.float32), axis=1)
        d_scores = weights * (d_weights - centre[:, None])
        d_bias_sum += d_scores

        if WHOLE:
            PARTS: tl.constexpr = KEYS + 2 * C
            image_d_parts = d_parts + image.to(tl.int64) * height * width * PARTS + head * HEAD_DIM
            d_v = multiply(tl.trans(weights.to(v.dtype)), d_mean)
            store_rows(image_d_parts + KEYS + C, key_place * PARTS, key_exists, d_v, HEAD_DIM)
            d_scores = d_scores.to(v.dtype)
            d_k = multiply(tl.trans(d_scores), q) * scale
            store_rows(image_d_parts + KEYS, key_place * PARTS, key_exists, d_k, HEAD_DIM)
            d_q = multiply(d_scores, k) * scale
            if SHARED_QUERIES:
                # The sum leaves the chip with the image's last window in this run.
                d_query_sum += d_q
                is_last = window + 1 == tl.minimum((image + 1) * num_windows, last)
                num_stored = tl.where(is_last, NUM_TOKENS, 0)
                slot = image.to(tl.int64) * runs_per_image + run % runs_per_image
                image_d_queries = d_queries + slot * (NUM_TOKENS * C) + head * HEAD_DIM
                store_rows(image_d_queries, query * C, query < num_stored, d_query_sum, HEAD_DIM)
                d_query_sum = tl.where(is_last, 0.0, d_query_sum)
            else:
                store_rows(image_d_parts, query_place * PARTS, query_exists, d_q, HEAD_DIM)

    run_d_bias = d_bias + (run.to(tl.int64) * NUM_HEADS + head) * (PADDED * PADDED)
    tl.store(run_d_bias + pair_query[:, None] * PADDED + pair_key[None, :], d_bias_sum)


@triton.jit
def backward_tiles(
    parts,
    queries,
    bias,
    out,
    lse,
    d_out,
    d_parts,
    d_queries,  # (B, n, N, C), to be summed over the windows
    scale,
    height,
    width,
    stride_b,
    stride_y,
    stride_x,
    NUM_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    WINDOW: tl.constexpr,
    SHARED_QUERIES: tl.constexpr,
    RAGGED: tl.constexpr,
    PADDED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Compute gradients of one tile of a window's tokens, as keys and values and as queries, over all other tokens."""
    NUM_TOKENS: tl.constexpr = WINDOW * WINDOW
    NUM_TILES: tl.constexpr = (NUM_TOKENS + BLOCK - 1) // BLOCK
    C: tl.constexpr = NUM_HEADS * HEAD_DIM
    KEYS: tl.constexpr = 0 if SHARED_QUERIES else C
    PARTS: tl.constexpr = KEYS + 2 * C
    head = tl.program_id(0) % NUM_HEADS
    first_token = tl.program_id(0) // NUM_HEADS % NUM_TILES * BLOCK
    window = tl.program_id(0) // NUM_HEADS // NUM_TILES
    num_windows = tl.cdiv(height, WINDOW) * tl.cdiv(width, WINDOW)
    image, place = window // num_windows, window % num_windows
    image_parts = parts + image.to(tl.int64) * stride_b + head * HEAD_DIM
    image_queries = queries + image.to(tl.int64) * (NUM_TOKENS * C) + head * HEAD_DIM
    image_out = out + image.to(tl.int64) * height * width * C + head * HEAD_DIM
    image_d_out = d_out + image.to(tl.int64) * height * width * C + head * HEAD_DIM
    image_d_parts = d_parts + image.to(tl.int64) * height * width * PARTS + head * HEAD_DIM
    lse_row = lse + (window * NUM_HEADS + head) * NUM_TOKENS

    own, own_y, own_x, own_exists = find_tokens(place, first_token, height, width, WINDOW, BLOCK)
    own_place = own_y * width + own_x
    own_offsets = own_y * stride_y + own_x * stride_x
    own_k = load_rows(image_parts + KEYS, own_offsets, own_exists, HEAD_DIM)
    own_v = load_rows(image_parts + KEYS + C, own_offsets, own_exists, HEAD_DIM)
    d_k = tl.zeros((BLOCK, HEAD_DIM), tl.float32)
    d_v = tl.zeros((BLOCK, HEAD_DIM), tl.float32)
    for tile in range(NUM_TILES):
        query, y, x, exists = find_tokens(place, tile * BLOCK, height, width, WINDOW, BLOCK)
        if SHARED_QUERIES:
            q = load_rows(image_queries, query * C, exists, HEAD_DIM)
        else:
            q = load_rows(image_parts, y * stride_y + x * stride_x, exists, HEAD_DIM)
        mean = load_rows(image_out, (y * width + x) * C, exists, HEAD_DIM)
        d_mean = load_rows(image_d_out, (y * width + x) * C, exists, HEAD_DIM)
        query_lse = tl.load(lse_row + query, mask=query < NUM_TOKENS, other=0.0)
        scores = score(q, own_k, load_bias(bias, head, query, own, PADDED), own_exists, scale, RAGGED)
        weights = tl.exp2(scores - query_lse[:, None])
        d_weights = multiply(d_mean, tl.trans(own_v))
        centre = tl.sum(d_mean.to(tl.float32) * mean.to(tl.float32), axis=1)
        d_scores = weights * (d_weights - centre[:, None])
        d_v += multiply(tl.trans(weights.to(own_v.dtype)), d_mean)
        d_k += multiply(tl.trans(d_scores.to(own_v.dtype)), q)
    store_rows(image_d_parts + KEYS, own_place * PARTS, own_exists, d_k * scale, HEAD_DIM)
    store_rows(image_d_parts + KEYS + C, own_place * PARTS, own_exists, d_v, HEAD_DIM)

    if SHARED_QUERIES:
        own_q = load_rows(image_queries, own * C, own_exists, HEAD_DIM)
    else:
        own_q = load_rows(image_parts, own_offsets, own_exists, HEAD_DIM)
    own_mean = load_rows(image_out, own_place * C, own_exists, HEAD_DIM)
    own_d_mean = load_rows(image_d_out, own_place * C, own_exists, HEAD_DIM)
    own_lse = tl.load(lse_row + own, mask=own < NUM_TOKENS, other=0.0)
    own_centre = tl.sum(own_d_mean.to(tl.float32) * own_mean.to(tl.float32), axis=1)
    d_q = tl.zeros((BLOCK, HEAD_DIM), tl.float32)
    for tile in range(NUM_TILES):
        key, y, x, exists = find_tokens(place, tile * BLOCK, height, width, WINDOW, BLOCK)
        k = load_rows(image_parts + KEYS, y * stride_y + x * stride_x, exists, HEAD_DIM)
        v = load_rows(image_parts + KEYS + C, y * stride_y + x * stride_x, exists, HEAD_DIM)
        scores = score(own_q, k, load_bias(bias, head, own, key, PADDED), exists, scale, RAGGED)
        d_weights = multiply(own_d_mean, tl.trans(v))
        d_scores = tl.exp2(scores - own_lse[:, None]) * (d_weights - own_centre[:, None])
        d_q += multiply(d_scores.to(k.dtype), k)
    if SHARED_QUERIES:
        # (B, n) flattened is `window`.
        slot = d_queries + window.to(tl.int64) * (NUM_TOKENS * C) + head * HEAD_DIM
        store_rows(slot, own * C, own < NUM_TOKENS, d_q * scale, HEAD_DIM)
    else:
        store_rows(image_d_parts, own_place * PARTS, own_exists, d_q * scale, HEAD_DIM)
