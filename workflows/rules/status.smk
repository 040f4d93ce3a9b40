"""Last of all: the slides that failed, and the exit status."""


localrules:
    status,


rule status:
    input:
        f"{DONE}/summary",
        every_model(),
        f"{DONE}/report" if config["report"] else [],
    output:
        touch(f"{DONE}/status"),
    log:
        f"{LOGS}/status.log",
    params:
        out=out_folder,
        fail_on=config["fail_on"],
    shell:
        # What failed is for the terminal, too.
        "pathopipe cohort status {params.out:q} --fail-on {params.fail_on} 2>&1 | tee {log:q}"
