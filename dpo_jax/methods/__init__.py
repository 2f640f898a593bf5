"""All methods, by the value of `loss.name` that chooses them."""

from dpo_jax.errors import UserError
from dpo_jax.methods.d3po import D3PO
from dpo_jax.methods.ddpo import DDPO
from dpo_jax.methods.dgpo import DGPO
from dpo_jax.methods.dmpo import DMPO
from dpo_jax.methods.dpo import DPO
from dpo_jax.methods.dpok import DPOK
from dpo_jax.methods.flow_grpo import FLOW_GRPO
from dpo_jax.methods.grpo import GRPO
from dpo_jax.methods.hinge import HINGE
from dpo_jax.methods.inpo import INPO
from dpo_jax.methods.ipo import IPO
from dpo_jax.methods.kto import KTO
from dpo_jax.methods.linear_dpo import LINEAR_DPO
from dpo_jax.methods.lpo import LPO
from dpo_jax.methods.mapo import MAPO
from dpo_jax.methods.method import Method as Method
from dpo_jax.methods.nft import NFT
from dpo_jax.methods.plackett_luce import PLACKETT_LUCE
from dpo_jax.methods.sft import SFT
from dpo_jax.methods.smpo import SMPO
from dpo_jax.methods.spo import SPO
from dpo_jax.nearest import nearest
from dpo_jax.user_code import import_object

OFFLINE = (DPO, IPO, HINGE, DMPO, LINEAR_DPO, SMPO, INPO, MAPO, PLACKETT_LUCE, SFT, KTO)
ONLINE = (D3PO, DDPO, DPOK, GRPO, FLOW_GRPO, NFT, DGPO, SPO, LPO)
METHODS = {method.name: method for method in (*OFFLINE, *ONLINE)}


def find_method(name: str) -> Method:
    """Return the method that `loss.name` chooses: one of `METHODS`, or `python=MODULE:NAME`, a `Method` of your own.

    Raises:
        UserError: there is none of this name, or its module cannot be imported.
    """
    if name.startswith("python="):
        method = import_object(name.removeprefix("python="), "method")
        if not isinstance(method, Method):
            raise UserError(f"config.loss.name={name} is a {type(method).__name__}, not a dpo_jax.methods.Method")
        return method
    if name not in METHODS:
        known = ", ".join(METHODS)
        raise UserError(
            f"config.loss.name={name!r} is not a method.{nearest(name, METHODS)} Choose one of {known}, or "
            "python=MODULE:NAME"
        )
    return METHODS[name]
