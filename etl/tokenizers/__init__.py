"""One file per modality; `timestep` combines them. Pipeline and agent both tokenize through here."""
