"""The layouts of Hugging Face folders: what each is called, how it is told from others, and what it is made of."""

from typing import Literal, NamedTuple

from rwkv_train.checkpoints.hugging_face import configs, names
from rwkv_train.checkpoints.hugging_face.configs import Keys
from rwkv_train.checkpoints.hugging_face.names import Rows

LayoutName = Literal["hf", "hf-remote"]
"""``"hf"``: the layout that an installed package loads, RWKV-5's that of the ``RWKV/`` repositories.
``"hf-remote"``: the layout of the ``RWKV/`` repositories, RWKV-5 and RWKV-6."""


class Layout(NamedTuple):
    """One way to lay an RWKV model into a folder."""

    title: str
    """What messages call it."""
    arch: str
    """``"rwkv4"`` to ``"rwkv7"``."""
    model_type: str
    """Key of the same name in ``config.json``."""
    architecture: str
    """The class, in ``architectures`` of ``config.json``."""
    mark: str
    """A tensor by which it is told from others of the same ``model_type``."""
    rows: Rows
    """Names of tensors."""
    keys: Keys
    """Keys of ``config.json``."""


RWKV4_TRANSFORMERS = Layout(
    title="RWKV-4 in transformers' layout",
    arch="rwkv4",
    model_type="rwkv",
    architecture="RwkvForCausalLM",
    mark="rwkv.embeddings.weight",
    rows=names.RWKV4_TRANSFORMERS,
    keys=configs.RWKV4_TRANSFORMERS,
)

RWKV5_REMOTE = Layout(
    title="RWKV-5 in the layout of the RWKV/ repositories",
    arch="rwkv5",
    model_type="rwkv5",
    architecture="Rwkv5ForCausalLM",
    mark="rwkv.embeddings.weight",
    rows=names.RWKV5_REMOTE,
    keys=configs.RWKV5_REMOTE,
)

RWKV6_REMOTE = Layout(
    title="RWKV-6 in the layout of the RWKV/ repositories",
    arch="rwkv6",
    model_type="rwkv6",
    architecture="Rwkv6ForCausalLM",
    mark="rwkv.embeddings.weight",
    rows=names.RWKV6_REMOTE,
    keys=configs.RWKV6_REMOTE,
)

RWKV6_FLA = Layout(
    title="RWKV-6 in flash-linear-attention's layout",
    arch="rwkv6",
    model_type="rwkv6",
    architecture="RWKV6ForCausalLM",
    mark="model.embeddings.weight",
    rows=names.RWKV6_FLA,
    keys=configs.RWKV6_FLA,
)

RWKV7_FLA = Layout(
    title="RWKV-7 in flash-linear-attention's layout",
    arch="rwkv7",
    model_type="rwkv7",
    architecture="RWKV7ForCausalLM",
    mark="model.layers.0.attn.x_r",
    rows=names.RWKV7_FLA,
    keys=configs.RWKV7_FLA,
)

RWKV7_FLA_OF_EARLY_2025 = RWKV7_FLA._replace(
    mark="model.layers.0.attn.x_x", rows=names.RWKV7_FLA_OF_EARLY_2025
)

READ = (
    RWKV4_TRANSFORMERS,
    RWKV5_REMOTE,
    RWKV6_REMOTE,
    RWKV6_FLA,
    RWKV7_FLA,
    RWKV7_FLA_OF_EARLY_2025,
)
"""Layouts that are read."""

WRITTEN: dict[LayoutName, dict[str, Layout]] = {
    "hf": {layout.arch: layout for layout in (RWKV4_TRANSFORMERS, RWKV5_REMOTE, RWKV6_FLA, RWKV7_FLA)},
    "hf-remote": {layout.arch: layout for layout in (RWKV5_REMOTE, RWKV6_REMOTE)},
}
"""What a user asks for -> the architecture -> the layout that is written."""
