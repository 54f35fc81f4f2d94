"""One file a modality; `timestep` puts them together. Pipeline and agent both tokenize through here."""
