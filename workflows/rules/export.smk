"""What other programs read, a slide at a time."""


rule export:
    input:
        embed=f"{DONE}/embed/{{slide_id}}.json" if config["encoders"] else [],
        segment=f"{DONE}/segment/{{slide_id}}.json" if config["segment"] else [],
    output:
        f"{DONE}/export-{{name}}/{{slide_id}}.json",
    log:
        f"{LOGS}/export-{{name}}/{{slide_id}}.log",
    retries: config["retries"]
    group:
        LATE_GROUP
    resources:
        mem_mb=lambda wildcards, attempt: 2000 * attempt,
        runtime=lambda wildcards, attempt: 30 * attempt,
    params:
        format=lambda wildcards: EXPORTS[wildcards.name]["format"],
        store=f"{OUT}/slides/{{slide_id}}.zarr",
        folder=f"{OUT}/exports/{{name}}",
        options=lambda wildcards: shlex.join(EXPORTS[wildcards.name]["options"]),
        after=lambda wildcards, input: " ".join(after(each) for each in input),
    shell:
        "pathopipe export {params.format} {params.options} --out {params.folder:q} {params.after}"
        " --receipt {output:q} -- {params.store:q} > {log:q} 2>&1"
