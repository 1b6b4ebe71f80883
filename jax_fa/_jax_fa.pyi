from collections.abc import Sequence

head_dims: tuple[int, ...]
taken_counts: int

def handlers() -> dict[str, object]: ...
def runs_hopper(capability: int) -> bool: ...
def decode_splits(
    batch: int,
    len_q: int,
    heads_q: int,
    heads_kv: int,
    head_dim: int,
    head_dim_v: int,
    max_len_kv: int,
    key_bytes: int = 2,
    grouped: bool = False,
) -> int: ...
def max_head_dim(element_bytes: int, backward: bool) -> int: ...
def packed_scratch(
    batch: int,
    heads_q: int,
    heads_kv: int,
    head_dim: int,
    head_dim_v: int,
    max_len_kv: int,
    split_size: int,
) -> tuple[int, int]: ...
def multiplies_bytes(head_dim: int, head_dim_v: int) -> bool: ...
def copy_scratch(
    rows: int, tokens: int, heads_kv: int, head_dim: int, head_dim_v: int
) -> tuple[int, int]: ...
def dq_sum_size(
    batch: int,
    len_q: int,
    total_q: int,
    heads_q: int,
    head_dim: int,
    head_dim_v: int,
    element_bytes: int,
    deterministic: bool,
) -> int: ...
def visible_keys(
    query: int, len_q: int, len_kv: int, window_left: int, window_right: int, top_left: bool
) -> tuple[int, int]: ...
def classify_tile(
    query0: int,
    query1: int,
    key0: int,
    key1: int,
    len_q: int,
    len_kv: int,
    window_left: int,
    window_right: int,
) -> str: ...
def seeing_queries(
    key0: int,
    key1: int,
    len_q: int,
    len_kv: int,
    window_left: int,
    window_right: int,
    top_left: bool,
) -> tuple[int, int]: ...
def parts_of_row(steps: int, part_steps: int) -> list[int]: ...
def philox(counter: Sequence[int], key: Sequence[int]) -> list[int]: ...
def prefill_share(sms: int, tiles: int, prefill: float, decode: float) -> int: ...
def part_candidate(i: int) -> int: ...
def decode_max_len_q(heads_group: int) -> int: ...
def hopper_place(
    i: int, tiles: int, pairs: int, section: int, longest_first: bool
) -> tuple[int, int]: ...
def plan(
    operation: str,
    *,
    batch: int,
    len_q: int,
    total_q: int,
    max_len_kv: int,
    heads_q: int,
    heads_kv: int,
    head_dim: int,
    head_dim_v: int,
    element_bytes: int,
    kv_bytes: int,
    general: bool,
    bias: bool,
    masked: bool,
    dropout_rate: float,
    grouped: bool,
    fp8_keys: bool,
    copied: bool,
    page_size: int,
    capability: int,
    sms: int,
    exact: bool,
    shared_kb: int,
) -> dict[str, object]: ...
def plan_backward(
    *,
    batch: int,
    len_q: int,
    total_q: int,
    len_kv: int,
    heads_q: int,
    heads_kv: int,
    head_dim: int,
    head_dim_v: int,
    element_bytes: int,
    deterministic: bool,
    general: bool,
    bias: bool,
    masked: bool,
    dropout_rate: float,
    capability: int,
    sms: int,
    exact: bool,
    shared_kb: int,
) -> dict[str, object]: ...
