{{/* What the programs are started with. */}}
{{- define "epserve.coordinatorArgs" -}}
{{- $c := .Values.coordinator -}}
- --checkpoint=/checkpoint
- {{ printf "--model-name=%s" (include "epserve.modelName" .) | quote }}
- --cluster-id={{ include "epserve.fullname" . }}
- --workers={{ include "epserve.numRanks" . }}
- --listen={{ .Values.listenHost }}:{{ $c.port }}
- --metrics-listen={{ .Values.listenHost }}:{{ $c.metricsPort }}
{{- if .Values.tls.enabled }}
{{- include "epserve.tlsArgs" . | nindent 0 }}
- --health-listen={{ .Values.listenHost }}:{{ $c.healthPort }}
{{- end }}
{{- if .Values.sharedSecrets.secretName }}
- --secrets-file=/etc/epserve/shared/secret
{{- end }}
{{- if not (or .Values.tls.enabled .Values.sharedSecrets.secretName) }}
- --insecure
{{- else if $c.plaintextMetrics }}
- --plaintext-metrics
{{- end }}
{{- if .Values.cudaSharedMemory.enabled }}
- --allow-client-shm
{{- end }}
# The workers are in other pods, with a /dev/shm of their own.
- --row-transport=messages
- --max-batch-tokens={{ int64 .Values.maxBatchTokens }}
- --slots={{ .Values.slots }}
- --queue-capacity={{ int64 $c.queueCapacity }}
- --max-held-bytes={{ include "epserve.maxHeldBytes" . }}
- --merge={{ $c.merge }}
- --batch-window-us={{ int64 $c.batchWindowUs }}
- --lease-ms={{ int64 $c.leaseMs }}
- --formation-timeout-ms={{ int64 $c.formationTimeoutMs }}
- --batch-timeout-ms={{ int64 $c.batchTimeoutMs }}
- --drain-timeout-ms={{ int64 $c.drainTimeoutMs }}
- --log-format={{ .Values.log.format }}
- --log-level={{ .Values.log.level }}
{{- end }}

{{/* Takes (list . INDEX). */}}
{{- define "epserve.workerArgs" -}}
{{- $ := index . 0 -}}
{{- $index := index . 1 -}}
{{- $w := $.Values.workers -}}
{{- $gpus := ne $.Values.backend "host" -}}
{{- $health := add (int $w.healthPort) $index -}}
- --coordinator={{ include "epserve.controlAddress" $ }}
- --checkpoint=/checkpoint
- --cluster-id={{ include "epserve.fullname" $ }}
# Host name and process id, the default, are alike in the pod's containers.
- --worker-id=$(POD_NAME)-w{{ $index }}
# The pod's containers share its ports.
- --health-listen={{ $.Values.listenHost }}:{{ $health }}
- --backend={{ $.Values.backend }}
{{- if $gpus }}
- --device={{ $index }}
{{- else }}
- --compute-threads={{ $w.computeThreads }}
{{- end }}
- --max-batch-tokens={{ int64 $.Values.maxBatchTokens }}
- --slots={{ $.Values.slots }}
- --peer-timeout-ms={{ int64 $w.peerTimeoutMs }}
- --leave-timeout-ms={{ int64 $w.leaveTimeoutMs }}
- --log-format={{ $.Values.log.format }}
- --log-level={{ $.Values.log.level }}
{{- with include "epserve.callerArgs" $ }}
{{- . | nindent 0 }}
{{- end }}
{{- end }}

{{/* Takes (list PART ARGS EXTRA): EXTRA, none of which ARGS or another value has set already. */}}
{{- define "epserve.extraArgs" -}}
{{- $part := index . 0 -}}
{{- $own := list "--insecure" "--plaintext-metrics" "--health-listen" "--secret-file" "--secrets-file" -}}
{{- $own = concat $own (list "--tls-cert" "--tls-key" "--tls-ca" "--device" "--compute-threads") -}}
{{- range index . 1 | fromYamlArray }}{{ $own = append $own (splitList "=" . | first) }}{{ end -}}
{{- range index . 2 -}}
{{- $name := splitList "=" . | first -}}
{{- if has $name $own -}}
{{- fail (printf "values: %s.extraArgs has %s, which the chart sets; use the value for it" $part $name) -}}
{{- end }}
- {{ . | quote }}
{{- end }}
{{- end }}
