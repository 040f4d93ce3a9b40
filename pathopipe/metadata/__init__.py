"""Metadata of a catalogue: fields predicted from slide, report and case table, and records that contradict them."""
