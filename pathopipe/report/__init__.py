"""Reports: what a person looks at after a run, a slide at a time and for the whole cohort."""
