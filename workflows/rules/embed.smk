"""The embeddings of a slide: all encoders in one job, which share what is read."""


rule embed:
    input:
        before=f"{DONE}/tiles/{{slide_id}}.json" if config["split"] else [],
        plan=ancient(PLAN),
    output:
        f"{DONE}/embed/{{slide_id}}.json",
    log:
        f"{LOGS}/embed/{{slide_id}}.log",
    retries: config["retries"]
    group:
        "embed" if config["split"] else "slide"
    threads: config["threads"]
    resources:
        mem_mb=needs("embed", "mem_mb"),
        runtime=needs("embed", "minutes"),
        gpu=needs("embed", "gpus"),
    params:
        slide=slide_path,
        out=out_folder,
        options=slide_options(with_encoders=True),
        before=lambda wildcards, input: after(input.before) if config["split"] else "--earlier",
    shell:
        "pathopipe embed --out {params.out:q} --slide-id={wildcards.slide_id:q} {params.options}"
        " --threads {threads} {params.before} --receipt {output:q} -- {params.slide:q} > {log:q} 2>&1"
