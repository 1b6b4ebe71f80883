"""The specification of every primitive in jnp, and its lowering where there is no kernel."""

from ._append import append as append
from ._dropout import dropout_keep as dropout_keep
from ._operations import decode as decode
from ._operations import fwd as fwd
from ._operations import fwd_bwd as fwd_bwd
from ._operations import hybrid as hybrid
from ._operations import varlen_bwd as varlen_bwd
from ._operations import varlen_fwd as varlen_fwd
