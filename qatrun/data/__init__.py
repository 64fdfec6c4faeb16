"""Tokenised, packed, seeded batches whose position can be saved and taken up again.

    documents (map-style or streaming)  ->  tokens  ->  packed sequences of seq_len  ->  batches

Documents follow each other with an EOS between them; attention runs across documents, as in pretraining. What opens
documents is loaded when first used: to check the demo's columns takes no `datasets`.
"""

from typing import TYPE_CHECKING

from qatrun.data.columns import check_source
from qatrun.lazy import lazy_names

if TYPE_CHECKING:
    from qatrun.data.documents import open_dataset
    from qatrun.data.packing import IGNORE_INDEX, Batch, Data, PackedStream, open_data, open_probe
else:
    __getattr__ = lazy_names(
        __name__,
        {
            "Batch": "qatrun.data.packing",
            "Data": "qatrun.data.packing",
            "IGNORE_INDEX": "qatrun.data.packing",
            "PackedStream": "qatrun.data.packing",
            "open_data": "qatrun.data.packing",
            "open_dataset": "qatrun.data.documents",
            "open_probe": "qatrun.data.packing",
        },
    )

__all__ = ["IGNORE_INDEX", "Batch", "Data", "PackedStream", "check_source", "open_data", "open_dataset", "open_probe"]
