"""The families that come with the package, one declaration each; importing this registers them and loads no model."""

from infimm_fast.export.common.family import register_family
from infimm_fast.export.models.infimm_hd import InfiMMHD

register_family(InfiMMHD())
