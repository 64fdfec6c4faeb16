"""Tokenised, packed, seeded batches whose position can be saved and taken up again.

    documents (map-style or streaming)  ->  tokens  ->  packed sequences of seq_len  ->  batches

Documents follow each other with an EOS between them; attention runs across documents, as in pretraining.
"""

from qatrun.data.documents import open_dataset
from qatrun.data.packing import IGNORE_INDEX, Batch, Data, PackedStream, open_data

__all__ = ["IGNORE_INDEX", "Batch", "Data", "PackedStream", "open_data", "open_dataset"]
