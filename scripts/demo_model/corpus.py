"""Documents to rows of tokens: written by worker processes while the network trains."""

import multiprocessing
import os
import queue
import random

import numpy as np

from .chat import document

ROW = 2048  # tokens in a row, and the longest context the model is trained for
DOCUMENTS_PER_SHARD = 2000
END = "<|endoftext|>"


def shard(seed, split, index):
    """The documents of one shard: the same for the same arguments, wherever it is written."""
    rng = random.Random(f"{seed}/{split}/{index}")
    return [document(rng) for _ in range(DOCUMENTS_PER_SHARD)]


def pack(documents, end_id, rng):
    """Token lists to rows [n, ROW]. A row starts with a document, and a document is cut only if longer than a row.

    First fit in order of falling length leaves less than a percent empty. What is empty holds `end_id`; two of
    them in a row occur nowhere else, so the loss can leave them out.
    """
    bins, room = [], []
    first_open = 0
    for tokens in sorted(documents, key=len, reverse=True):
        tokens = tokens[:ROW]
        for i in range(first_open, len(bins)):
            if room[i] >= len(tokens):
                break
        else:
            i = len(bins)
            bins.append([])
            room.append(ROW)
        bins[i].append(tokens)
        room[i] -= len(tokens)
        while first_open < len(bins) and room[first_open] < 8:
            first_open += 1
    rows = np.full((len(bins), ROW), end_id, dtype=np.uint16)
    for row, parts in zip(rows, bins):
        rng.shuffle(parts)
        flat = [token for part in parts for token in part]
        row[: len(flat)] = flat
    return rows


def encode_shard(tokenizer, seed, split, index):
    """One shard as rows."""
    encodings = tokenizer.encode_batch_fast([text + END for text in shard(seed, split, index)], add_special_tokens=False)
    rows = pack([e.ids for e in encodings], tokenizer.token_to_id(END), random.Random(index))
    return rows[np.random.default_rng(index).permutation(len(rows))]


def _work(tokenizer_json, seed, first, step, out):
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_str(tokenizer_json)
    index = first
    while True:
        out.put(encode_shard(tokenizer, seed, "train", index))
        index += step


class Rows:
    """Batches of rows for training: fresh ones as long as the workers keep up, else rows seen before."""

    def __init__(self, tokenizer, seed, workers, batch):
        os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are the parallelism
        context = multiprocessing.get_context("spawn")
        self._queue = context.Queue(maxsize=16 * workers)
        self._workers = [
            context.Process(target=_work, args=(tokenizer.to_str(), seed, w, workers, self._queue), daemon=True)
            for w in range(workers)
        ]
        for worker in self._workers:
            worker.start()
        self._rng, self._batch = np.random.default_rng(seed), batch
        self._pool, self._kept = [], []
        self.fresh = self.repeated = 0

    def next(self):
        """[batch, ROW] uint16."""
        while sum(map(len, self._pool)) < self._batch:
            try:
                # Only the very first rows are worth waiting for: later, old rows are better than an idle GPU.
                rows = self._queue.get(timeout=None if not self._kept else 0.002)
                self._kept.append(rows)
                self.fresh += rows.size
            except queue.Empty:
                rows = self._kept[self._rng.integers(len(self._kept))]
                self.repeated += rows.size
            self._pool.append(rows)
        rows = np.concatenate(self._pool)
        self._pool = [rows[self._batch :]]
        return rows[: self._batch]

    def close(self):
        """Ends the workers."""
        for worker in self._workers:
            worker.terminate()
            worker.join()
