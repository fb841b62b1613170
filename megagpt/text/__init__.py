"""Words of texts and runs of words, as numbers: what data preparation and evaluation compare texts by."""
