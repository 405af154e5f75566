"""Names, shapes and types of the tensors that cross Triton's door: their only home.

The ONNX export names its inputs and outputs from here, a test holds
``triton_repo/*/config.pbtxt`` against it, and the sidecar builds requests with it.
``batch`` is the first axis of every tensor.
"""

from typing import Final, NamedTuple


class TensorSpec(NamedTuple):
    """One tensor of a served model.

    ``dims`` excludes the batch axis; -1 is an axis whose size the release fixes or the request
    chooses. ``datatype`` is Triton's name of the element type.
    """

    name: str
    datatype: str
    dims: tuple[int, ...]


TCN: Final = "tcn"
SESSION_ITEMS: Final = TensorSpec("session_items", "FP32", (-1, -1))
"""``[batch, length, dim]``: the open session's item embeddings, newest first, zero-padded."""
SESSION_LENGTH: Final = TensorSpec("session_length", "INT32", (1,))
"""``[batch, 1]``: how many of the positions are real; 0 for a session not yet begun."""
USER_STATE: Final = TensorSpec("user_state", "FP32", (-1,))
"""``[batch, hidden]``: top layer of the user's hidden state before this session."""
USER_EMBEDDING: Final = TensorSpec("user_embedding", "FP32", (-1,))
"""``[batch, dim]``: the dynamic user embedding ``u`` (HierTCN Eq. 11)."""

GRU_STEP: Final = "gru_step"
STATE: Final = TensorSpec("state", "FP32", (-1, -1))
"""``[batch, layers, hidden]``: hidden state before the session."""
SESSION_MEAN: Final = TensorSpec("session_mean", "FP32", (-1,))
"""``[batch, dim]``: mean embedding of the closed session's items."""
NEXT_STATE: Final = TensorSpec("next_state", "FP32", (-1, -1))
"""``[batch, layers, hidden]``: hidden state after the session (HierTCN Eq. 10)."""

ITEM_ENCODER: Final = "item_encoder"
"""Embeds items that came after the release; optional, absent in releases of earlier versions."""
FEATURES: Final = TensorSpec("features", "FP32", (-1,))
"""``[batch, features]``: encoded attributes, ignored where not present; one column if the release
encodes none."""
FEATURES_PRESENT: Final = TensorSpec("features_present", "INT32", (1,))
"""``[batch, 1]``: 1 if the item has any feature, else 0."""
NEIGHBOR_LAYERS: Final = TensorSpec("neighbor_layers", "FP32", (-1, -1))
"""``[batch, neighbors, layers * hidden]``: rows of the release's ``item_layers``, zero-padded."""
NEIGHBOR_WEIGHTS: Final = TensorSpec("neighbor_weights", "FP32", (-1,))
"""``[batch, neighbors]``: summing to 1 over an item's neighbors, 0 for padding."""
ITEM_EMBEDDING: Final = TensorSpec("item_embedding", "FP32", (-1,))
"""``[batch, dim]``: the item's vector without the popularity prior, of length 1."""

INPUTS: Final[dict[str, tuple[TensorSpec, ...]]] = {
    TCN: (SESSION_ITEMS, SESSION_LENGTH, USER_STATE),
    GRU_STEP: (STATE, SESSION_MEAN),
    ITEM_ENCODER: (FEATURES, FEATURES_PRESENT, NEIGHBOR_LAYERS, NEIGHBOR_WEIGHTS),
}
OUTPUTS: Final[dict[str, tuple[TensorSpec, ...]]] = {
    TCN: (USER_EMBEDDING,),
    GRU_STEP: (NEXT_STATE,),
    ITEM_ENCODER: (ITEM_EMBEDDING,),
}

LENGTH_BUCKETS: Final = (4, 8, 16, 32, 64, 128)
"""Lengths a session is padded to, so that Triton's batcher, which groups only equal shapes,
finds requests to group. The largest exceeds the TCN's receptive field of 121 positions."""

MAX_BATCH: Final = {TCN: 128, GRU_STEP: 1024, ITEM_ENCODER: 256}
"""Largest batch of one request; ``max_batch_size`` of ``triton_repo/*/config.pbtxt``."""
