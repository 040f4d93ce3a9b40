"""The page that says what happened."""


rule summary:
    input:
        every_slide(),
    output:
        touch(f"{DONE}/summary"),
    log:
        f"{LOGS}/summary.log",
    params:
        out=out_folder,
    shell:
        "pathopipe cohort status {params.out:q} --fail-on never > {log:q} 2>&1"


rule report:
    input:
        f"{DONE}/summary",
        every_model(),
        manifest=config["manifest"],
    output:
        touch(f"{DONE}/report"),
    log:
        f"{LOGS}/report.log",
    resources:
        mem_mb=4000,
        runtime=60,
    params:
        out=out_folder,
    shell:
        "pathopipe report {params.out:q} --labels {input.manifest:q} > {log:q} 2>&1"
