"""All that was stored of a slide, read back when its last stage has ended."""


rule verify:
    input:
        last_stages,
    output:
        f"{DONE}/verify/{{slide_id}}.json",
    log:
        f"{LOGS}/verify/{{slide_id}}.log",
    retries: config["retries"]
    group:
        LATE_GROUP
    resources:
        mem_mb=lambda wildcards, attempt: 1000 * attempt,
        runtime=lambda wildcards, attempt: 30 * attempt,
    params:
        store=f"{OUT}/slides/{{slide_id}}.zarr",
        after=lambda wildcards, input: " ".join(after(each) for each in input),
    shell:
        "pathopipe verify {params.after} --receipt {output:q} -- {params.store:q} > {log:q} 2>&1"
